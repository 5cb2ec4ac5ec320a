//! Copies of golden models with other tensors and other config keys.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::{EngineConfig, LoadedModel, WeightDtype, load_model};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

use crate::driver::golden_dir;

/// A tensor in memory.
#[derive(Clone)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Stored {
    pub fn f32(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    /// Little-endian words of a tensor of 32 bits.
    pub fn words(&self) -> Vec<u32> {
        self.bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("4 bytes"))).collect()
    }

    pub fn to_f32(&self) -> Vec<f32> {
        assert_eq!(self.dtype, Dtype::F32);
        self.words().into_iter().map(f32::from_bits).collect()
    }
}

/// A model folder to be written, by default equal to a golden one.
pub struct Edit {
    pub config: Value,
    pub tensors: BTreeMap<String, Stored>,
}

/// A written model folder, removed on drop.
pub struct Folder(PathBuf);

impl Edit {
    pub fn of(golden: &str) -> Self {
        let dir = golden_dir(golden);
        let config = std::fs::read(dir.join("config.json")).expect("the config");
        let file = std::fs::read(dir.join("model.safetensors")).expect("the tensors");
        let tensors = SafeTensors::deserialize(&file).expect("safetensors").iter().map(own).collect();
        Self { config: serde_json::from_slice(&config).expect("JSON"), tensors }
    }

    /// Changes every tensor whose name ends with `ending`.
    pub fn each(&mut self, ending: &str, mut change: impl FnMut(&mut Stored)) {
        let found = self.tensors.iter_mut().filter(|(name, _)| name.ends_with(ending));
        assert!(found.map(|(_, stored)| change(stored)).count() > 0, "no tensor ends with {ending}");
    }

    /// Names that end with `ending`, without it.
    pub fn stems(&self, ending: &str) -> Vec<String> {
        self.tensors.keys().filter_map(|name| name.strip_suffix(ending)).map(str::to_owned).collect()
    }

    pub fn remove(&mut self, name: &str) -> Stored {
        self.tensors.remove(name).expect("a tensor of that name")
    }

    pub fn write(&self) -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("moesaic-edit-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).expect("a temporary folder");
        std::fs::write(dir.join("config.json"), self.config.to_string()).expect("a config");
        let views = self.tensors.iter().map(|(name, stored)| {
            (name, TensorView::new(stored.dtype, stored.shape.clone(), &stored.bytes).expect("bytes of that shape"))
        });
        let bytes = safetensors::serialize(views, None).expect("safetensors");
        std::fs::write(dir.join("model.safetensors"), bytes).expect("a file");
        Folder(dir)
    }

    /// Why it cannot be loaded; `none` where it can.
    pub fn refusal(&self) -> String {
        let folder = self.write();
        let config = EngineConfig { kv_cache_memory: Some(1 << 20), ..EngineConfig::new(folder.path()) };
        load_model(&config, &mut |_| {}).map_or_else(|error| error.to_string(), |_| "none".to_owned())
    }

    /// The logits of a short prompt, in f32.
    pub fn logits(&self) -> Vec<Vec<f32>> {
        self.write().load(WeightDtype::F32).runner.logits_of(&[5, 17, 200, 3, 91]).expect("logits")
    }
}

impl Folder {
    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn load(&self, dtype: WeightDtype) -> LoadedModel {
        let config = EngineConfig { dtype, kv_cache_memory: Some(1 << 20), ..EngineConfig::new(self.path()) };
        load_model(&config, &mut |_| {}).expect("the model loads")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn own((name, view): (&str, TensorView<'_>)) -> (String, Stored) {
    (name.to_owned(), Stored { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
}
