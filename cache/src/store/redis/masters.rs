//! Which master of a cluster serves which key.

use std::collections::HashMap;

use redis::cluster_routing::Slot;
use redis::{RedisError, RedisResult, Value as Reply, cmd};

use super::link::{Connection, Node};

/// The masters that hold slots, when they were asked.
#[derive(Debug, Default)]
pub(super) struct Masters {
    nodes: Vec<Node>,
    /// The place of a slot's master in `nodes`.
    by_slot: HashMap<Slot, usize>,
    /// Of the one master that tells no host, as a cluster of one node may, which then is whoever was asked.
    unnamed_port: Option<u16>,
}

impl Masters {
    /// Asks any node.
    pub async fn ask(connection: &mut Connection) -> RedisResult<Self> {
        let mut slots = cmd("CLUSTER");
        slots.arg("SLOTS");
        let Reply::Array(ranges) = connection.query(&slots).await? else { return Err(unexpected("ranges of slots")) };
        let mut masters = Self::default();
        for range in ranges {
            masters.add(range)?;
        }
        Ok(masters)
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Who serves `key`.
    pub fn of(&self, key: &str) -> Option<&Node> {
        self.by_slot.get(&Slot::for_key(key)).map(|&idx| &self.nodes[idx])
    }

    /// Adds a range: first slot, last slot, then nodes, the master before its replicas.
    fn add(&mut self, range: Reply) -> RedisResult<()> {
        let Reply::Array(parts) = range else { return Err(unexpected("a range of slots")) };
        let [first, last, Reply::Array(master), ..] = &parts[..] else { return Err(unexpected("slots and a master")) };
        let [host, port, ..] = &master[..] else { return Err(unexpected("host and port")) };
        let node = self.node(host, redis::from_redis_value(port.clone())?)?;
        let idx = self.nodes.iter().position(|known| *known == node).unwrap_or_else(|| {
            self.nodes.push(node);
            self.nodes.len() - 1
        });
        let slot = |reply: &Reply| match reply {
            Reply::Int(number) => u16::try_from(*number).map_err(|_| unexpected("numbers of slots")),
            _ => Err(unexpected("numbers of slots")),
        };
        let (first, last) = (slot(first)?, slot(last)?);
        self.by_slot.extend((first..=last).filter_map(Slot::new).map(|slot| (slot, idx)));
        Ok(())
    }
}

impl Masters {
    fn node(&mut self, host: &Reply, port: u16) -> RedisResult<Node> {
        let host: Option<String> = redis::from_redis_value(host.clone())?;
        let host = host.filter(|host| !host.is_empty() && host != "?");
        let is_alone = |known: Option<u16>| known.is_none_or(|known| known == port);
        match host {
            Some(host) if self.unnamed_port.is_none() => Ok(Node::At { host, port }),
            None if is_alone(self.unnamed_port) && self.nodes.iter().all(|node| *node == Node::Only) => {
                self.unnamed_port = Some(port);
                Ok(Node::Only)
            }
            _ => Err(unexpected("hosts of all masters")),
        }
    }
}

fn unexpected(expected: &'static str) -> RedisError {
    RedisError::from((
        redis::ErrorKind::UnexpectedReturnType,
        "CLUSTER SLOTS answered something else than",
        expected.to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: i64, last: i64, port: i64) -> Reply {
        let text = |text: &str| Reply::BulkString(text.as_bytes().to_vec());
        let node = |port| Reply::Array(vec![text("10.0.0.1"), Reply::Int(port), text("id")]);
        Reply::Array(vec![Reply::Int(first), Reply::Int(last), node(port), node(port + 1000)])
    }

    #[test]
    fn a_key_belongs_to_the_master_of_its_slot() {
        let mut masters = Masters::default();
        for (first, last, port) in [(0, 5460, 7000), (10923, 16383, 7002), (5461, 10000, 7001), (10001, 10922, 7000)] {
            masters.add(range(first, last, port)).unwrap();
        }
        let at = |port| Node::At { host: "10.0.0.1".to_owned(), port };
        assert_eq!(masters.nodes(), [at(7000), at(7002), at(7001)]);
        // As `CLUSTER KEYSLOT` says: 12739, 866 and 5061.
        for (key, port) in [("123456789", 7002), ("hello", 7000), ("bar", 7000)] {
            assert_eq!(masters.of(key), Some(&at(port)), "{key}");
        }
        assert_eq!(Masters::default().of("hello"), None);
    }

    #[test]
    fn one_master_may_tell_no_host_but_not_one_of_several() {
        let range = |host, port| {
            Reply::Array(vec![Reply::Int(0), Reply::Int(100), Reply::Array(vec![host, Reply::Int(port), Reply::Nil])])
        };
        let text = |text: &str| Reply::BulkString(text.as_bytes().to_vec());
        for host in [Reply::Nil, text(""), text("?")] {
            let mut masters = Masters::default();
            masters.add(range(host.clone(), 7000)).unwrap();
            masters.add(range(host.clone(), 7000)).unwrap();
            assert_eq!(masters.nodes(), [Node::Only]);
            assert!(masters.add(range(host.clone(), 7001)).is_err());
            assert!(masters.add(range(text("10.0.0.1"), 7000)).is_err());
            let mut masters = Masters::default();
            masters.add(range(text("10.0.0.1"), 7000)).unwrap();
            assert!(masters.add(range(host, 7000)).is_err());
        }
    }

    #[test]
    fn other_answers_are_errors() {
        for reply in [Reply::Nil, Reply::Array(vec![]), Reply::Array(vec![Reply::Int(0), Reply::Int(1), Reply::Nil])] {
            assert!(Masters::default().add(reply).is_err());
        }
        let all = range(0, i64::MAX, 7000);
        assert!(Masters::default().add(all).is_err(), "slots are numbers of 16 bits");
    }
}
