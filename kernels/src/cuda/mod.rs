//! Device code: what the `.cu` files of all ops share, and their tests on the emulator of `kernels/emulator`.

#[cfg(test)]
mod tests;
