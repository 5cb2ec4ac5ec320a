//! Reads experts from the files of a packed folder, which may shrink, change or go while the server runs.

use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};

use kernels::{ExpertWeights, FileStamp, PackedWeight, RangeBytes, RangeFile, ReadMode};

use super::catalog::{ExpertCatalog, ExpertPlace, MatrixPlace};
use crate::error::EngineError;
use crate::experts::ExpertId;

/// The files and where in them each expert is.
#[derive(Debug)]
pub(super) struct ExpertSource {
    files: Vec<SourceFile>,
    /// `[moe layer][expert]`.
    layers: Vec<Vec<Option<ExpertPlace>>>,
    mode: ReadMode,
}

#[derive(Debug)]
struct SourceFile {
    path: PathBuf,
    /// As it was at the start.
    stamp: FileStamp,
    open: RwLock<Arc<RangeFile>>,
}

/// The matrices of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    GateUp,
    Down,
}

/// Why an expert was not read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unread {
    /// Nobody wants it any more.
    GivenUp,
    /// With the name of the file.
    Fault(String),
}

impl ExpertSource {
    /// `mode`: `None` is past the page cache where the file system can.
    ///
    /// # Errors
    /// A file that cannot be opened in this way.
    pub(super) fn open(catalog: ExpertCatalog, mode: Option<ReadMode>) -> Result<Self, EngineError> {
        let num_layers = catalog.layers.keys().last().map_or(0, |last| last + 1);
        let mut layers: Vec<Vec<Option<ExpertPlace>>> = (0..num_layers).map(|_| Vec::new()).collect();
        for (moe_idx, layer) in catalog.layers {
            layers[moe_idx] = layer.experts;
        }
        let places = layers.iter().flatten().flatten().flat_map(|expert| [&expert.gate_up, &expert.down]);
        let mut paths: Vec<&Path> = places.map(|place| place.path.as_path()).collect();
        paths.sort_unstable();
        paths.dedup();
        // Some file systems take the flag and refuse the read.
        let read_byte = |path: &Path| RangeFile::open(path, ReadMode::Direct)?.read(0..1, None);
        let is_direct = |path: &&Path| read_byte(path).is_ok();
        let possible = || if paths.iter().all(is_direct) { ReadMode::Direct } else { ReadMode::Cached };
        let mode = mode.unwrap_or_else(possible);
        let open = |path: &Path| {
            let file = RangeFile::open(path, mode)?;
            Ok(SourceFile { path: path.to_owned(), stamp: file.stamp()?, open: RwLock::new(Arc::new(file)) })
        };
        let named = |path: &Path| open(path).map_err(|source| EngineError::Read { path: path.to_owned(), source });
        let files = paths.iter().copied().map(named).collect::<Result<_, _>>()?;
        Ok(Self { files, layers, mode })
    }

    pub(super) fn mode(&self) -> ReadMode {
        self.mode
    }

    /// A matrix of an expert, in the memory of `reuse` where that fits; `between` is for others that go first, or for giving up.
    ///
    /// # Errors
    /// Why not.
    ///
    /// # Panics
    /// There is no such expert.
    pub(super) fn read(
        &self,
        (id, part): (ExpertId, Part),
        reuse: Option<PackedWeight>,
        between: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<PackedWeight, Unread> {
        let expert = self.place(id);
        let place = match part {
            Part::GateUp => &expert.gate_up,
            Part::Down => &expert.down,
        };
        self.read_matrix(place, reuse.and_then(PackedWeight::into_range), between)
    }

    /// The expert of its matrices.
    pub(super) fn expert(&self, id: ExpertId, [gate_up, down]: [PackedWeight; 2]) -> ExpertWeights {
        let place = self.place(id);
        ExpertWeights { gate_up, down, biases: place.biases.clone(), activation: place.activation }
    }

    fn place(&self, id: ExpertId) -> &ExpertPlace {
        self.layers[id.layer as usize][id.expert as usize].as_ref().expect("it has matrices")
    }

    fn read_matrix(
        &self,
        place: &MatrixPlace,
        reuse: Option<RangeBytes>,
        between: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<PackedWeight, Unread> {
        let file = self.files.iter().find(|file| file.path == place.path).expect("every path was opened");
        let open = Arc::clone(&file.open.read().unwrap_or_else(PoisonError::into_inner));
        let bytes = file.read(&open, place, (reuse, &mut *between)).or_else(|error| {
            if error == Unread::GivenUp {
                return Err(error);
            }
            // Who has put it right may have written another file under its name.
            let again = RangeFile::open(&file.path, self.mode).map_err(|_| error)?;
            let bytes = file.read(&again, place, (None, between))?;
            *file.open.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(again);
            Ok::<_, Unread>(bytes)
        })?;
        let [rows, cols] = place.shape;
        PackedWeight::from_range(bytes, place.format, rows, cols).map_err(|error| Unread::Fault(error.to_string()))
    }
}

impl SourceFile {
    /// The bytes of a place. They sum up to what they must, if that is known: now, or when they were read before and the file is
    /// as it was. Of a file that has changed it must be known.
    fn read(
        &self,
        open: &RangeFile,
        place: &MatrixPlace,
        (reuse, between): (Option<RangeBytes>, &mut dyn FnMut() -> ControlFlow<()>),
    ) -> Result<RangeBytes, Unread> {
        let range = place.offset..place.offset + place.num_bytes();
        let bytes = open.read_in_pieces(range, reuse, between).map_err(|error| match error.kind() {
            ErrorKind::Interrupted => Unread::GivenUp,
            _ => self.fault(&error.to_string()),
        })?;
        // Asked after the bytes were read: a change in between is seen.
        let is_same = open.stamp().is_ok_and(|stamp| stamp == self.stamp);
        if is_same && place.is_checked.load(Ordering::Relaxed) {
            return Ok(bytes);
        }
        let Some(sum) = &place.sum else {
            let reason = "it was changed while the server runs, and moesaic.json has no checksums of it";
            return if is_same { Ok(bytes) } else { Err(self.fault(reason)) };
        };
        if blake3::hash(bytes.as_slice()).to_hex().as_str() == sum {
            place.is_checked.fetch_or(is_same, Ordering::Relaxed);
            return Ok(bytes);
        }
        Err(self.fault(match is_same {
            true => "it holds other bytes than moesaic.json says",
            false => "it was changed while the server runs, and holds other bytes",
        }))
    }

    /// Clients read it: no folders.
    fn fault(&self, reason: &str) -> Unread {
        Unread::Fault(format!("{}: {reason}", self.path.file_name().unwrap_or_default().to_string_lossy()))
    }
}
