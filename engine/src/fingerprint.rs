//! What the bits of an output depend on beside the request: the name under which computed things may be found again.

use std::sync::{Arc, OnceLock};

use kernels::MappedFile;

/// Two engines of equal fingerprints give the same bytes for the same request.
///
/// It is made of two parts. The numerics are known when a model is loaded: this program's version and that of
/// its arithmetic ([`kernels::NUMERICS_VERSION`]), the instruction set, config.json, the storage of weights and of keys
/// and values, the block size, the length that rotary tables were made for. They tell caches apart that live no longer than their engine. The weights are the digest that a packed folder
/// states (it is believed, as the rest of that folder's index is), else blake3 over every byte of the checkpoint:
/// fine-tunes may differ in a few rows of one table, which no sample of the bytes would find.
///
/// Tokenizer and chat template are the server's, who mixes them in where prompts are kept as text.
#[derive(Debug)]
pub struct Fingerprint {
    numerics: [u8; 32],
    weights: Weights,
    whole: OnceLock<[u8; 32]>,
}

/// What the weights are known by.
#[derive(Debug)]
pub(crate) enum Weights {
    /// As a packed folder's index says.
    Digest(String),
    /// Files in the order of the checkpoint.
    Files(Vec<(String, Arc<MappedFile>)>),
}

impl Weights {
    /// See [`Fingerprint::sampled_weights`].
    pub(crate) fn sample(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        match self {
            Self::Digest(digest) => update_with_len(&mut hasher, digest.as_bytes()),
            Self::Files(files) => {
                for (name, file) in files {
                    update_with_len(&mut hasher, name.as_bytes());
                    hasher.update(&(file.len() as u64).to_le_bytes());
                    let last = file.len().saturating_sub(SAMPLE_BYTES);
                    for idx in 0..NUM_SAMPLES {
                        let start = last / (NUM_SAMPLES - 1) * idx;
                        hasher.update(&file[start..file.len().min(start + SAMPLE_BYTES)]);
                    }
                }
            }
        }
        hasher.finalize().into()
    }
}

impl Fingerprint {
    /// `settings` are all of the numerics, each with its name.
    pub(crate) fn new(settings: &[(&str, String)], weights: Weights) -> Self {
        let mut hasher = blake3::Hasher::new();
        for (name, value) in settings {
            update_with_len(&mut hasher, name.as_bytes());
            update_with_len(&mut hasher, value.as_bytes());
        }
        Self { numerics: hasher.finalize().into(), weights, whole: OnceLock::new() }
    }

    /// All but the weights: enough within one process.
    pub fn numerics(&self) -> [u8; 32] {
        self.numerics
    }

    /// The weights alone, whatever is made of them in memory, and soon: by the digest of a packed folder, else by the names and
    /// lengths of the files and samples of their bytes. It tells models apart, and most fine-tunes, but not all.
    pub fn sampled_weights(&self) -> [u8; 32] {
        self.weights.sample()
    }

    /// Numerics and weights, for what outlives the process or is shared with others. The first call reads all files of a
    /// checkpoint that is not packed, some seconds for each 10 GB: for a thread that may wait.
    pub fn whole(&self) -> [u8; 32] {
        *self.whole.get_or_init(|| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&self.numerics);
            match &self.weights {
                Weights::Digest(digest) => update_with_len(&mut hasher, digest.as_bytes()),
                Weights::Files(files) => files.iter().for_each(|(name, file)| {
                    update_with_len(&mut hasher, name.as_bytes());
                    update_with_len(&mut hasher, file);
                    file.release_pages();
                }),
            }
            hasher.finalize().into()
        })
    }
}

/// Bytes of a sample of a file.
const SAMPLE_BYTES: usize = 4096;
const NUM_SAMPLES: usize = 16;

/// No two lists of parts give the same bytes.
fn update_with_len(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
}
