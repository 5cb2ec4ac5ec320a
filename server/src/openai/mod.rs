//! Wire types of the OpenAI API and, where OpenAI defines none, vLLM's. Shapes only: meaning is given in [`crate::validate`].

pub mod chat;
pub mod completions;
pub mod error;
pub mod expert_loads;
pub mod logprobs;
pub mod models;
pub mod routed_experts;
pub mod routing;
pub mod sampling;
pub mod tokenize;
pub mod usage;

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

/// One value or a list of them.
// Values are texts so far, and errors say so.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
pub enum OneOrMany<T: ToSchema> {
    One(T),
    Many(Vec<T>),
}

impl<T: ToSchema> OneOrMany<T> {
    pub fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    Stop,
    Length,
}

/// What stopped a choice: the stop string or the stop token id of the request; null for the model's own stop token.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum StopReason {
    Text(String),
    Token(u32),
}

/// An object among a request's fields, and what one looks like.
trait Options {
    const EXAMPLE: &'static str;
}

/// An object or null. A derived structure alone would take a list too, field after field in an order that is not the client's to know.
fn object<'de, D: Deserializer<'de>, T: Options + Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    struct Object<T>(PhantomData<T>);

    impl<'de, T: Options + Deserialize<'de>> Visitor<'de> for Object<T> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "an object like {}", T::EXAMPLE)
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Self::Value, A::Error> {
            T::deserialize(MapAccessDeserializer::new(fields)).map(Some)
        }
    }

    deserializer.deserialize_any(Object(PhantomData))
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct StreamOptions {
    /// Send a last chunk with no choices and the usage of the whole request.
    pub include_usage: Option<bool>,
    /// Send the usage so far with every chunk.
    pub continuous_usage_stats: Option<bool>,
}

impl Options for StreamOptions {
    const EXAMPLE: &'static str = r#"{"include_usage": true}"#;
}

/// `cache`: both are true where absent. Only requests with temperature 0 or a seed use the output cache.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CacheOptions {
    /// It may be answered by what was computed before, or is being computed for another request.
    pub read: Option<bool>,
    /// What it computes may answer other requests.
    pub write: Option<bool>,
}

impl Options for CacheOptions {
    const EXAMPLE: &'static str = r#"{"read": false, "write": false}"#;
}

/// `moe`: fewer experts than the model's routers choose, for a compute budget, and what they cost. Answers under other options
/// than the model's own are not kept in the output cache, and name them in `usage.moe`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MoeOptions {
    /// Of a token's experts keep the first whose weights reach this share of all their weights. Range 0.001 to 1; the server's
    /// --expert-top-p where absent.
    pub top_p: Option<f32>,
    /// And of those at most so many, 1 and up.
    pub max_experts: Option<u32>,
    /// Say in `usage.moe` what the experts cost. Such an answer does not come from the output cache, nor go there.
    pub usage: Option<bool>,
}

impl Options for MoeOptions {
    const EXAMPLE: &'static str = r#"{"top_p": 0.8, "max_experts": 2, "usage": true}"#;
}
