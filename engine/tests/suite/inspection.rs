//! What `inspect` says of a folder is what loading it takes.

use engine::{EngineConfig, WeightDtype, inspect, load_model};

use crate::driver::golden_dir;

#[test]
fn memory_is_what_the_loaded_weights_take() {
    let mut num_checked = 0;
    for entry in std::fs::read_dir(golden_dir("")).expect("tests/golden") {
        let dir = entry.expect("a readable entry").path();
        if !dir.is_dir() {
            continue;
        }
        let inspection = inspect(&dir).expect("an inspection");
        for (dtype, stated) in
            [(WeightDtype::Auto, inspection.memory_bytes), (WeightDtype::F32, inspection.memory_bytes_f32)]
        {
            let config = EngineConfig { dtype, kv_cache_memory: Some(1 << 20), ..EngineConfig::new(&dir) };
            let loaded = load_model(&config, &mut |_| {}).expect("a model");
            assert_eq!(loaded.summary.weight_bytes, stated, "{} with {dtype:?}", dir.display());
        }
        let of_classes: u64 = inspection.classes.iter().map(|size| size.memory_bytes).sum();
        assert_eq!(of_classes, inspection.memory_bytes, "{}", dir.display());
        num_checked += 1;
    }
    assert!(num_checked >= 48, "{num_checked} folders");
}
