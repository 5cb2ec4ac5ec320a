//! The architectures that are served from GGUF, by llama.cpp's names, and how their layouts differ.

use crate::error::EngineError;
use crate::weights::gguf::GgufFile;

/// A row of the table of architectures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arch {
    Llama,
    Qwen2Moe,
    Qwen3Moe,
    Olmoe,
    GraniteMoe,
    DeepSeek2,
    GptOss,
}

/// What Hugging Face calls the parts of a MoE layer, under the layer's prefix.
pub(super) struct MoeNames {
    /// The router, without `.weight`.
    pub(super) router: &'static str,
    /// The block that holds `experts`.
    pub(super) block: &'static str,
    /// Gate, up and down of an expert.
    pub(super) projections: [&'static str; 3],
    /// The shared experts.
    pub(super) shared: &'static str,
}

impl Arch {
    const ALL: [Self; 7] =
        [Self::Llama, Self::Qwen2Moe, Self::Qwen3Moe, Self::Olmoe, Self::GraniteMoe, Self::DeepSeek2, Self::GptOss];

    /// What `general.architecture` says.
    pub(super) fn of(gguf: &GgufFile) -> Result<Self, EngineError> {
        let found = gguf.opt_str("general.architecture")?.unwrap_or("(none)");
        Self::ALL.into_iter().find(|arch| arch.name() == found).ok_or_else(|| {
            let supported = Self::ALL.map(Self::name).join(", ");
            gguf.invalid(format!("metadata `general.architecture` is `{found}`, supported are {supported}"))
        })
    }

    /// llama.cpp's name, with which the keys begin.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2Moe => "qwen2moe",
            Self::Qwen3Moe => "qwen3moe",
            Self::Olmoe => "olmoe",
            Self::GraniteMoe => "granitemoe",
            Self::DeepSeek2 => "deepseek2",
            Self::GptOss => "gpt-oss",
        }
    }

    /// Whether llama.cpp's converter leaves the rows of queries and keys in rotary pairs. DeepSeek's are in pairs from the
    /// start, and rotate so.
    pub(super) fn stores_rotary_pairs(self) -> bool {
        matches!(self, Self::Llama | Self::GraniteMoe)
    }

    pub(super) fn moe_names(self) -> MoeNames {
        let projections = ["gate_proj", "up_proj", "down_proj"];
        let plain = MoeNames { router: "mlp.gate", block: "mlp", projections, shared: "mlp.shared_experts" };
        match self {
            Self::Llama => MoeNames {
                router: "block_sparse_moe.gate",
                block: "block_sparse_moe",
                projections: ["w1", "w3", "w2"],
                ..plain
            },
            Self::GraniteMoe => MoeNames {
                router: "block_sparse_moe.router.layer",
                block: "block_sparse_moe",
                shared: "shared_mlp",
                ..plain
            },
            Self::Qwen2Moe => MoeNames { shared: "mlp.shared_expert", ..plain },
            Self::GptOss => MoeNames { router: "mlp.router", ..plain },
            Self::Qwen3Moe | Self::Olmoe | Self::DeepSeek2 => plain,
        }
    }
}
