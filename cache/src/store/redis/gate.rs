//! The circuit in front of Redis: who may call, what a result says about its health, and the probe that heals it.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use redis::{ErrorKind, RedisError, RedisResult, ServerErrorKind, cmd};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::link::{CONNECT_TIMEOUT, Connection, Link};
use crate::breaker::{Breaker, BreakerConfig, Change};
use crate::error::CacheError;
use crate::store::Tier;
use crate::telemetry::{self, Notice};

/// A call that had less time than this says nothing about Redis when it runs out.
const FAIR_TIME: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(super) struct Gate {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    link: Link,
    breaker: Mutex<Breaker>,
    refusals: Notice,
}

/// What a result says about Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It answered, be it with an error about this one command.
    Healthy,
    /// It answered that it will not do such commands: full, read-only, forbidden by its ACL.
    Refuses,
    /// It cannot be used.
    Sick,
}

impl Gate {
    pub fn new(link: Link, config: BreakerConfig) -> Self {
        telemetry::circuit(false);
        Self {
            shared: Arc::new(Shared { link, breaker: Mutex::new(Breaker::new(config)), refusals: Notice::default() }),
        }
    }

    pub fn is_open(&self) -> bool {
        self.shared.breaker().is_open()
    }

    /// Runs `work` on the connection, by `deadline` at the latest; at once an error while the circuit is open.
    pub async fn call<T, W: Future<Output = RedisResult<T>>>(
        &self,
        deadline: Instant,
        work: impl FnOnce(Connection) -> W,
    ) -> Result<T, CacheError> {
        if self.is_open() {
            return Err(CacheError::CircuitOpen);
        }
        let start = Instant::now();
        let connecting = self.shared.link.get();
        let result = timeout_at(deadline, async { work(connecting.clone().await?).await }).await;
        let Ok(result) = result else {
            if deadline.saturating_duration_since(start) >= FAIR_TIME {
                self.failed(&"no answer in time");
            }
            return Err(CacheError::Timeout { tier: Tier::Redis });
        };
        match result.as_ref().map_or_else(judge, |_| Verdict::Healthy) {
            Verdict::Healthy => self.shared.breaker().succeeded(),
            Verdict::Refuses => {
                self.shared.breaker().succeeded();
                if let (Err(error), true) = (&result, self.shared.refusals.is_due()) {
                    tracing::warn!(%error, "Redis refuses commands of the cache; requests go on without them");
                }
            }
            Verdict::Sick => {
                self.shared.link.failed(&connecting);
                if let Err(error) = &result {
                    self.failed(error);
                }
            }
        }
        result.map_err(CacheError::Redis)
    }

    /// An answer was not one to what was asked: on this connection, none can be trusted any more.
    pub fn distrust(&self) {
        self.shared.link.reset();
    }

    fn failed(&self, reason: &dyn std::fmt::Display) {
        let change = self.shared.breaker().failed(Instant::now());
        if change == Some(Change::Opened) {
            tracing::warn!(%reason, "Redis fails: the cache goes on without it and looks again now and then");
            telemetry::circuit(true);
            self.shared.link.reset();
            tokio::spawn(heal(Arc::downgrade(&self.shared)));
        }
    }
}

impl Shared {
    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether Redis answers on a connection made for this.
    async fn answers(&self) -> bool {
        self.link.reset();
        let ping = async {
            let mut connection = self.link.get().await?;
            connection.query(&cmd("PING")).await
        };
        let result: Result<RedisResult<redis::Value>, _> = timeout(CONNECT_TIMEOUT, ping).await;
        result.is_ok_and(|result| result.as_ref().map_or_else(judge, |_| Verdict::Healthy) != Verdict::Sick)
    }
}

/// Probes until Redis answers; ends with the store.
async fn heal(shared: Weak<Shared>) {
    loop {
        let next_probe = shared.upgrade().and_then(|shared| shared.breaker().next_probe());
        let Some(next_probe) = next_probe else { return };
        sleep_until(next_probe).await;
        let Some(shared) = shared.upgrade() else { return };
        if !shared.breaker().start_probe(Instant::now()) {
            continue;
        }
        if !shared.answers().await {
            shared.breaker().probe_failed(Instant::now());
            continue;
        }
        if let Some(Change::Closed { after }) = shared.breaker().probe_succeeded(Instant::now()) {
            telemetry::circuit(false);
            tracing::info!(?after, "Redis answers again: the cache uses it");
        }
        return;
    }
}

fn judge(error: &RedisError) -> Verdict {
    match error.kind() {
        ErrorKind::Server(kind) => match kind {
            ServerErrorKind::NoPerm | ServerErrorKind::ReadOnly => Verdict::Refuses,
            ServerErrorKind::BusyLoading | ServerErrorKind::ClusterDown | ServerErrorKind::MasterDown => Verdict::Sick,
            _ => Verdict::Healthy,
        },
        ErrorKind::Extension => match error.code() {
            Some("OOM" | "MISCONF" | "NOREPLICAS") => Verdict::Refuses,
            Some("NOAUTH" | "WRONGPASS") => Verdict::Sick,
            _ => Verdict::Healthy,
        },
        _ => Verdict::Sick,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_about_a_command_are_not_errors_of_the_server() {
        let check = |line: &str, expected| {
            let error = redis::parse_redis_value(line.as_bytes()).unwrap().extract_error().unwrap_err();
            assert_eq!(judge(&error), expected, "{line}");
        };
        check("-WRONGTYPE Operation against a key holding the wrong kind of value\r\n", Verdict::Healthy);
        check("-ERR unknown command\r\n", Verdict::Healthy);
        check("-OOM command not allowed when used memory > 'maxmemory'.\r\n", Verdict::Refuses);
        check("-READONLY You can't write against a read only replica.\r\n", Verdict::Refuses);
        check("-NOPERM no permissions\r\n", Verdict::Refuses);
        check("-MISCONF Redis is configured to save RDB snapshots\r\n", Verdict::Refuses);
        check("-LOADING Redis is loading the dataset in memory\r\n", Verdict::Sick);
        check("-NOAUTH Authentication required.\r\n", Verdict::Sick);
        check("-CLUSTERDOWN The cluster is down\r\n", Verdict::Sick);
        assert_eq!(judge(&std::io::Error::from(std::io::ErrorKind::ConnectionReset).into()), Verdict::Sick);
    }
}
