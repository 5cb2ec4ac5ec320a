//! Many values at once: their commands are on the way together, and what becomes of a node's is one verdict about it.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use futures::future::join_all;
use redis::{RedisError, RedisResult, Value as Reply};
use tokio::time::{Instant, timeout_at};

use super::failure::judge_command;
use super::gate::Gate;
use super::link::{Connection, Node};
use super::{Command, RedisStore, bytes_of, is_kept, unexpected};
use crate::circuit::Verdict;
use crate::codec;
use crate::error::CacheError;
use crate::store::{Address, Found, Kind, Tier, Value};

impl RedisStore {
    /// Few bytes, little time: not on the connection of KV blocks.
    pub(super) async fn has_many(&self, addresses: &[Address], deadline: Instant) -> Result<Vec<bool>, CacheError> {
        let commands: Vec<_> = addresses.iter().map(|address| self.about("EXISTS", address)).collect();
        let replies = call_many(&self.gate, &commands, deadline).await.into_iter();
        replies
            .map(|reply| match reply? {
                Reply::Int(count) => Ok(count > 0),
                _ => Err(unexpected(&self.gate, "a count")),
            })
            .collect()
    }

    pub(super) async fn find_many(
        &self,
        kind: Kind,
        addresses: &[Address],
        deadline: Instant,
    ) -> Vec<Result<Option<Found>, CacheError>> {
        let gate = self.gate_of(kind);
        let commands: Vec<_> = addresses.iter().map(|address| self.read(address)).collect();
        let replies = call_many(gate, &commands, deadline).await.into_iter();
        let sealed: Vec<_> = replies.map(|reply| bytes_of(gate, reply?)).collect();
        let whole: Vec<_> = addresses
            .iter()
            .zip(&sealed)
            .filter_map(|(address, sealed)| Some((*address, sealed.as_ref().ok()?.clone()?)))
            .collect();
        // Checksums of megabytes.
        let opening = off_thread(deadline, move || {
            let now = SystemTime::now();
            whole.iter().map(|(address, bytes)| codec::open(address, bytes, now)).collect::<Vec<_>>()
        });
        let mut opened = match opening.await {
            Ok(opened) => opened.into_iter(),
            Err(error) => return sealed.into_iter().map(|sealed| sealed.and(Err(again(&error)))).collect(),
        };
        let mut found = Vec::with_capacity(addresses.len());
        for (address, sealed) in addresses.iter().zip(sealed) {
            found.push(match sealed {
                Ok(Some(_)) => {
                    let opened = opened.next().expect("each that was found was opened");
                    Ok(self.take(address, opened, deadline).await)
                }
                Ok(None) => Ok(None),
                Err(error) => Err(error),
            });
        }
        found
    }

    pub(super) async fn keep_many(
        &self,
        kind: Kind,
        values: &[(Address, Value)],
        deadline: Instant,
    ) -> Vec<Result<(), CacheError>> {
        let gate = self.gate_of(kind);
        let mut kept: Vec<_> = values.iter().map(|(_, value)| self.check_size(kind, value)).collect();
        if gate.is_shut() {
            // Nothing is sealed for nobody.
            return kept.into_iter().map(|kept| kept.and(Err(CacheError::CircuitOpen { tier: Tier::Redis }))).collect();
        }
        let fit: Vec<_> =
            values.iter().zip(&kept).filter(|(_, kept)| kept.is_ok()).map(|(each, _)| each.clone()).collect();
        let writer = self.clone();
        let commands = off_thread(deadline, move || {
            fit.iter().map(|(address, value)| writer.write(address, value)).collect::<Vec<_>>()
        });
        let commands = match commands.await {
            Ok(commands) => commands,
            Err(error) => return kept.into_iter().map(|kept| kept.and(Err(again(&error)))).collect(),
        };
        let mut replies = call_many(gate, &commands, deadline).await.into_iter();
        for ((address, value), kept) in values.iter().zip(&mut kept) {
            if kept.is_ok() {
                let reply = replies.next().expect("each that fits was sent");
                *kept = reply.and_then(|reply| is_kept(gate, address, value, reply));
            }
        }
        kept
    }
}

/// Runs commands at once, and gives their answers in their order. What was answered counts, though others fail or are late.
async fn call_many(gate: &Arc<Gate>, commands: &[Command], deadline: Instant) -> Vec<Result<Reply, CacheError>> {
    let mut by_node: HashMap<Node, Vec<usize>> = HashMap::new();
    for (idx, command) in commands.iter().enumerate() {
        by_node.entry(gate.node_of(&command.key)).or_default().push(idx);
    }
    let answers: Vec<OnceLock<RedisResult<Reply>>> = commands.iter().map(|_| OnceLock::new()).collect();
    let calls = by_node.iter().map(|(node, idxs)| {
        let parts: Vec<_> = idxs.iter().map(|&idx| (&commands[idx], &answers[idx])).collect();
        gate.call(node, deadline, |connection| run(connection, parts))
    });
    let verdicts: Vec<_> = join_all(calls).await;
    let mut reasons: Vec<Option<&CacheError>> = vec![None; commands.len()];
    for (idxs, verdict) in by_node.values().zip(&verdicts) {
        for &idx in idxs {
            reasons[idx] = verdict.as_ref().err();
        }
    }
    let answers = answers.into_iter().map(OnceLock::into_inner);
    answers
        .zip(reasons)
        .map(|(answer, reason)| match answer {
            Some(answer) => answer.map_err(CacheError::from),
            None => Err(reason.map_or(CacheError::Timeout { tier: Tier::Redis }, again)),
        })
        .collect()
}

/// Runs the commands of one node. An error says something about the node: of those about one command, the answer tells.
async fn run(connection: Connection, parts: Vec<(&Command, &OnceLock<RedisResult<Reply>>)>) -> RedisResult<()> {
    let queries = parts.into_iter().map(|(command, place)| {
        let mut connection = connection.clone();
        async move {
            let answer = connection.query(&command.command).await;
            let error = answer.as_ref().err().cloned();
            place.set(answer).expect("a command is answered once");
            error
        }
    });
    let errors: Vec<RedisError> = join_all(queries).await.into_iter().flatten().collect();
    for verdict in [Verdict::Sick, Verdict::Refuses] {
        if let Some(error) = errors.iter().find(|error| judge_command(error) == verdict) {
            return Err(error.clone());
        }
    }
    Ok(())
}

/// The error of a call, for one more of its values.
fn again(error: &CacheError) -> CacheError {
    match error {
        CacheError::CircuitOpen { tier } => CacheError::CircuitOpen { tier: *tier },
        CacheError::Redis(error) => CacheError::Redis(error.clone()),
        _ => CacheError::Timeout { tier: Tier::Redis },
    }
}

/// Runs what takes its time where it is in nobody's way; by `deadline` at the latest.
async fn off_thread<T: Send + 'static>(
    deadline: Instant,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, CacheError> {
    match timeout_at(deadline, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(done)) => Ok(done),
        _ => Err(CacheError::Timeout { tier: Tier::Redis }),
    }
}
