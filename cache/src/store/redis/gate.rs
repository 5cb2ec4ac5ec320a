//! Redis behind its circuits: one for a server, one for each master of a cluster, so that a node that is down costs the keys of
//! the others nothing.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt as _};
use redis::RedisResult;
use tokio::time::{Instant, timeout};

use super::failure::Failure;
use super::link::{CONNECT_TIMEOUT, Connection, Link, Node};
use super::masters::Masters;
use crate::breaker::BreakerConfig;
use crate::circuit::{Circuit, NO_ANSWER, Place, Verdict};
use crate::error::CacheError;
use crate::store::Tier;

/// Time between two questions which master serves what: calls that fail ask it.
const LEARN_INTERVAL: Duration = Duration::from_secs(1);

/// Time for a new connection to a cluster, some nodes of which may not answer, and for a greeting on it.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(super) struct Gate {
    link: Arc<Link>,
    config: BreakerConfig,
    /// For a server, and for what of a cluster no master is known for.
    only: Circuit<Member>,
    /// Absent for a server.
    cluster: Option<Mutex<Cluster>>,
}

/// What is known of a cluster. It says whose fault a call is, not where it goes: that is the client's to know.
#[derive(Debug, Default)]
struct Cluster {
    masters: Masters,
    circuits: HashMap<Node, Arc<Circuit<Member>>>,
    last_asked: Option<Instant>,
}

impl Gate {
    pub fn new(link: Link, config: BreakerConfig) -> Self {
        let cluster = link.is_cluster().then(Mutex::default);
        let link = Arc::new(link);
        let only = Circuit::new(Member { link: Arc::clone(&link), node: Node::Only }, config);
        Self { link, config, only, cluster }
    }

    /// Whether a part of it is left alone.
    pub fn is_open(&self) -> bool {
        self.only.is_open()
            || self.cluster().is_some_and(|cluster| cluster.circuits.values().any(|circuit| circuit.is_open()))
    }

    /// Whether all of it is left alone.
    pub fn is_shut(&self) -> bool {
        self.cluster.is_none() && self.only.is_open()
    }

    /// Who serves `key`, as far as that is known.
    pub fn node_of(&self, key: &str) -> Node {
        self.cluster().and_then(|cluster| cluster.masters.of(key).cloned()).unwrap_or(Node::Only)
    }

    /// Runs `work`, which is for `node`, on the connection, by `deadline` at the latest; at once an error while its circuit is open.
    pub async fn call<T, W: Future<Output = RedisResult<T>>>(
        self: &Arc<Self>,
        node: &Node,
        deadline: Instant,
        work: impl FnOnce(Connection) -> W,
    ) -> Result<T, CacheError> {
        let of_node = self.cluster().and_then(|cluster| cluster.circuits.get(node).cloned());
        let result = of_node.as_deref().unwrap_or(&self.only).call(deadline, self.link.run(work)).await;
        // Of a node that is left alone too: another may have taken its slots over.
        let is_failed =
            matches!(result, Err(CacheError::Timeout { .. } | CacheError::Redis(_) | CacheError::CircuitOpen { .. }));
        if is_failed || *node == Node::Only {
            self.learn();
        }
        result
    }

    /// Asks whether Redis answers at all.
    pub async fn greet(self: &Arc<Self>, deadline: Instant) -> Result<(), CacheError> {
        self.call(&Node::Only, deadline, async |mut connection| connection.greet(&Node::Only).await).await
    }

    /// Looks once whether it can be used.
    pub async fn check(&self) {
        self.only.check().await;
    }

    /// The masters that hold slots.
    pub async fn masters(&self, deadline: Instant) -> Result<Vec<Node>, CacheError> {
        if self.cluster.is_none() {
            return Ok(vec![Node::Only]);
        }
        let masters =
            self.only.call(deadline, self.link.run(async |mut connection| Masters::ask(&mut connection).await));
        Ok(masters.await?.nodes().to_vec())
    }

    /// An answer was not one to what was asked: on this connection, none can be trusted any more.
    pub fn distrust(&self) {
        self.link.reset();
    }

    /// Asks a cluster in the background who serves what.
    fn learn(self: &Arc<Self>) {
        let Some(mut cluster) = self.cluster() else { return };
        if cluster.last_asked.is_some_and(|last| last.elapsed() < LEARN_INTERVAL) {
            return;
        }
        cluster.last_asked = Some(Instant::now());
        drop(cluster);
        let gate = Arc::clone(self);
        tokio::spawn(async move {
            let asking = gate.link.run(async |mut connection| Masters::ask(&mut connection).await);
            // Who does not answer now is asked again after the next failure.
            if let Ok(Ok(masters)) = timeout(CONNECT_TIMEOUT, asking).await {
                gate.know(masters);
            }
        });
    }

    fn know(&self, masters: Masters) {
        let Some(mut cluster) = self.cluster() else { return };
        let mut circuits = HashMap::new();
        for node in masters.nodes() {
            let known = cluster.circuits.remove(node);
            let new =
                || Arc::new(Circuit::new(Member { link: Arc::clone(&self.link), node: node.clone() }, self.config));
            circuits.insert(node.clone(), known.unwrap_or_else(new));
        }
        cluster.circuits = circuits;
        cluster.masters = masters;
    }

    fn cluster(&self) -> Option<MutexGuard<'_, Cluster>> {
        Some(self.cluster.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A part of Redis that fails as a whole.
pub(super) struct Member {
    link: Arc<Link>,
    node: Node,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.node {
            Node::Only => f.write_str("Redis"),
            Node::At { host, port } => write!(f, "Redis at {host}:{port}"),
        }
    }
}

impl Place for Member {
    type Error = Failure;

    const TIER: Tier = Tier::Redis;

    fn judge(failure: &Failure) -> Verdict {
        failure.judge()
    }

    fn opened(&self) {
        // A cluster's other nodes are on the same connection.
        if self.node == Node::Only {
            self.link.reset();
        }
    }

    fn answers(&self) -> BoxFuture<'_, Result<(), String>> {
        async {
            if self.node == Node::Only {
                // A connection made for this.
                self.link.reset();
            }
            let greet = async |mut connection: Connection| connection.greet(&self.node).await;
            let answer = in_time(CONNECT_TIMEOUT, self.link.run(greet)).await;
            // The client may have lost its way to a node that is there; the others are served meanwhile.
            match answer {
                Err(_) if self.node != Node::Only => in_time(RENEWAL_TIMEOUT, self.link.renew(greet)).await,
                answer => answer,
            }
        }
        .boxed()
    }
}

/// Any answer to a greeting will do, but none that says that the server cannot be used.
async fn in_time(limit: Duration, greeting: impl Future<Output = Result<(), Failure>>) -> Result<(), String> {
    match timeout(limit, greeting).await {
        Ok(Err(failure)) if failure.judge() == Verdict::Sick => Err(failure.to_string()),
        Ok(_) => Ok(()),
        Err(_) => Err(NO_ANSWER.to_owned()),
    }
}
