//! Which experts tokens took, in vLLM's shape.

use engine::{NO_EXPERT, RoutedLayout};
use serde::ser::SerializeSeq as _;
use serde::{Serialize, Serializer};

/// Experts of consecutive tokens, `[token][layer][slot]`: ids from 0, the router's best first. Layers are those that have a
/// router, in the order in which a token meets them; their numbers of slots may differ. One that did not run is -1.
#[derive(Clone, Debug)]
pub struct RoutedExperts {
    /// All of them in a row.
    pub ids: Vec<u16>,
    pub layout: RoutedLayout,
}

impl Serialize for RoutedExperts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let tokens = self.ids.chunks_exact(self.layout.ids_per_token().max(1));
        let mut seq = serializer.serialize_seq(Some(tokens.len()))?;
        for ids in tokens {
            seq.serialize_element(&OneToken { ids, layout: &self.layout })?;
        }
        seq.end()
    }
}

struct OneToken<'a> {
    ids: &'a [u16],
    layout: &'a RoutedLayout,
}

impl Serialize for OneToken<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let cut = |rest: &mut &'_ [u16], top_k: usize| {
            let (of_layer, behind) = rest.split_at(top_k);
            *rest = behind;
            of_layer.iter().map(|&id| if id == NO_EXPERT { -1 } else { i32::from(id) }).collect::<Vec<i32>>()
        };
        serializer.collect_seq(self.layout.layers().iter().scan(self.ids, |rest, layer| Some(cut(rest, layer.top_k))))
    }
}

#[cfg(test)]
mod tests {
    use engine::MoeShape;

    use super::*;

    #[test]
    fn layers_may_take_unlike_numbers_of_experts() {
        let layer = |top_k| MoeShape { num_experts: 300, top_k };
        let layout = RoutedLayout::new(&[layer(2), layer(1)]);
        let experts = |ids: &[u16]| RoutedExperts { ids: ids.into(), layout: layout.clone() };
        assert_eq!(serde_json::to_string(&experts(&[7, 1, 299, 0, 2, 3])).unwrap(), "[[[7,1],[299]],[[0,2],[3]]]");
        assert_eq!(serde_json::to_string(&experts(&[7, NO_EXPERT, 299])).unwrap(), "[[[7,-1],[299]]]");
        assert_eq!(serde_json::to_string(&experts(&[])).unwrap(), "[]");
    }
}
