//! Removing all keys of a prefix: SCAN and UNLINK in bounded steps, on every master.

use redis::{RedisError, Value as Reply, cmd};
use tokio::time::Instant;

use super::gate::Gate;
use super::link::Node;
use crate::error::CacheError;

/// Keys that Redis looks at in one step: a few tenths of a millisecond during which it serves nobody else.
const STEP: usize = 500;

pub(super) async fn clear(gate: &Gate, is_cluster: bool, pattern: &str, deadline: Instant) -> Result<(), CacheError> {
    let nodes = if is_cluster { masters(gate, deadline).await? } else { vec![Node::Only] };
    for node in &nodes {
        let mut cursor = b"0".to_vec();
        loop {
            let mut scan = cmd("SCAN");
            scan.arg(&cursor[..]).arg("MATCH").arg(pattern).arg("COUNT").arg(STEP);
            let reply = gate.call(deadline, async |mut connection| connection.query_node(&scan, node).await).await?;
            let (next, keys): (Vec<u8>, Vec<Vec<u8>>) = redis::from_redis_value(reply).map_err(unexpected)?;
            if !keys.is_empty() {
                let mut unlink = cmd("UNLINK");
                unlink.arg(&keys);
                // Routed by key, not to the node: the keys of a node lie in many slots, which one command must not mix.
                gate.call(deadline, async |mut connection| connection.query(&unlink).await).await?;
            }
            if next == b"0" {
                break;
            }
            cursor = next;
        }
    }
    Ok(())
}

/// The masters that hold slots.
async fn masters(gate: &Gate, deadline: Instant) -> Result<Vec<Node>, CacheError> {
    let mut slots = cmd("CLUSTER");
    slots.arg("SLOTS");
    let reply = gate.call(deadline, async |mut connection| connection.query(&slots).await).await?;
    let Reply::Array(ranges) = reply else { return Err(CacheError::Reply { expected: "ranges of slots" }) };
    let mut nodes = Vec::new();
    for range in ranges {
        // First slot, last slot, then nodes: the master before its replicas.
        let Reply::Array(parts) = range else { return Err(CacheError::Reply { expected: "a range of slots" }) };
        let Some(Reply::Array(master)) = parts.into_iter().nth(2) else {
            return Err(CacheError::Reply { expected: "a master" });
        };
        let [host, port, ..] = &master[..] else { return Err(CacheError::Reply { expected: "host and port" }) };
        let host: String = redis::from_redis_value(host.clone()).map_err(unexpected)?;
        let port: u16 = redis::from_redis_value(port.clone()).map_err(unexpected)?;
        let node = Node::At { host, port };
        if !nodes.contains(&node) {
            nodes.push(node);
        }
    }
    Ok(nodes)
}

fn unexpected(error: redis::ParsingError) -> CacheError {
    CacheError::Redis(RedisError::from(error))
}
