//! What the loader refuses.

use safetensors::tensor::TensorView;

use super::super::gguf_fixture::TempDir;
use super::*;
use crate::config::WeightDtype;

#[test]
fn stacked_fp8_is_refused_and_not_misread() {
    let dir = TempDir::new("loader-stacked-fp8");
    let tensors = [
        ("experts", TensorView::new(Dtype::F8_E4M3, vec![200, 1, 2], &[0x38; 400]).unwrap()),
        ("experts_scale_inv", TensorView::new(Dtype::F32, vec![1, 1], &[0; 4]).unwrap()),
    ];
    dir.write("model.safetensors", &safetensors::serialize(tensors, None).unwrap());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut progress = |_| ();
    let loader = Loader::new(&checkpoint, Quantization::default(), WeightDtype::Auto, &mut progress);
    for error in [
        loader.stacked_weights(("experts", Role::Expert), [200, 1, 2]).unwrap_err(),
        loader.borrow_stacked("experts", [200, 1, 2]).unwrap_err(),
    ] {
        let error = error.to_string();
        assert!(error.starts_with("tensor `experts` is stored as F8_E4M3, which is not supported"), "{error}");
    }
}
