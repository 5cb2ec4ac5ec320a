//! Removing all keys of a prefix: SCAN and UNLINK in bounded steps, on every master.

use std::sync::Arc;

use redis::{RedisError, cmd};
use tokio::time::Instant;

use super::gate::Gate;
use crate::error::CacheError;

/// Keys that Redis looks at in one step: a few tenths of a millisecond during which it serves nobody else.
const STEP: usize = 500;

pub(super) async fn clear(gate: &Arc<Gate>, pattern: &str, deadline: Instant) -> Result<(), CacheError> {
    for node in &gate.masters(deadline).await? {
        let mut cursor = b"0".to_vec();
        loop {
            let mut scan = cmd("SCAN");
            scan.arg(&cursor[..]).arg("MATCH").arg(pattern).arg("COUNT").arg(STEP);
            let reply =
                gate.call(node, deadline, async |mut connection| connection.query_node(&scan, node).await).await?;
            let (next, keys): (Vec<u8>, Vec<Vec<u8>>) = redis::from_redis_value(reply).map_err(unexpected)?;
            if !keys.is_empty() {
                let mut unlink = cmd("UNLINK");
                unlink.arg(&keys);
                // Routed by key, not to the node: the keys of a node lie in many slots, which one command must not mix.
                gate.call(node, deadline, async |mut connection| connection.query(&unlink).await).await?;
            }
            if next == b"0" {
                break;
            }
            cursor = next;
        }
    }
    Ok(())
}

fn unexpected(error: redis::ParsingError) -> CacheError {
    CacheError::Redis(RedisError::from(error))
}
