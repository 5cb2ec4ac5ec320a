//! One multiplexed connection to Redis: made in the background, awaited no longer than a caller's budget, thrown away when it
//! fails or the circuit opens.
//!
//! Not the client's `ConnectionManager`: where making a connection once ends in anything but an I/O error, say in an answer that is
//! no Redis, it keeps that error for ever.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt as _, Shared};
use redis::aio::MultiplexedConnection;
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{RoutingInfo, SingleNodeRoutingInfo};
use redis::{AsyncConnectionConfig, Cmd, RedisError, RedisResult, cmd};

use super::failure::Failure;
use super::target::Target;
use crate::circuit::Verdict;

/// Time that making a connection may take, in the background.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Time after which an answer is not expected any more. Callers have deadlines of their own, far shorter; this one ends what the
/// client does by itself.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Commands that wait to be written.
const PIPELINE_BUFFER: usize = 256;

/// A server, or a cluster: that one connects to its nodes again by itself, as a rule.
#[derive(Clone)]
pub(super) enum Connection {
    Server(MultiplexedConnection),
    Cluster(ClusterConnection),
}

/// A node of a cluster, or the one server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Node {
    Only,
    At { host: String, port: u16 },
}

impl Connection {
    pub async fn query(&mut self, command: &Cmd) -> RedisResult<redis::Value> {
        match self {
            Self::Server(connection) => command.query_async(connection).await,
            Self::Cluster(connection) => command.query_async(connection).await,
        }
    }

    /// Asks whether `node` answers; of a cluster without a name, any node.
    pub async fn greet(&mut self, node: &Node) -> RedisResult<()> {
        let mut slots = cmd("CLUSTER");
        match (&*self, node) {
            // The client would ask every master for a PING.
            (Self::Cluster(_), Node::Only) => self.query(slots.arg("SLOTS")).await.map(drop),
            _ => self.query_node(&cmd("PING"), node).await.map(drop),
        }
    }

    pub async fn query_node(&mut self, command: &Cmd, node: &Node) -> RedisResult<redis::Value> {
        match (self, node) {
            (Self::Cluster(connection), Node::At { host, port }) => {
                let routing = SingleNodeRoutingInfo::ByAddress { host: host.clone(), port: *port };
                connection.route_command(command.clone(), RoutingInfo::SingleNode(routing)).await
            }
            (connection, _) => connection.query(command).await,
        }
    }
}

type Connecting = Shared<BoxFuture<'static, Result<Connection, RedisError>>>;

/// The connection, or the making of it.
pub(super) struct Link {
    target: Target,
    current: Mutex<Option<Connecting>>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Link").field(&self.target).finish()
    }
}

impl Link {
    pub fn new(target: Target) -> Self {
        Self { target, current: Mutex::default() }
    }

    /// Throws the connection away, with all that waits on it.
    pub fn reset(&self) {
        *self.lock() = None;
    }

    /// The connection, to be awaited. Whoever stops waiting does not stop the making.
    fn get(&self) -> Connecting {
        let mut current = self.lock();
        if let Some(connecting) = &*current {
            return connecting.clone();
        }
        let task = tokio::spawn(connect(self.target.clone()));
        let connecting =
            task.map(|joined| joined.unwrap_or_else(|panic| Err(std::io::Error::other(panic).into()))).boxed().shared();
        *current = Some(connecting.clone());
        connecting
    }

    /// Runs `work` on the connection. One that turns out to be broken is not used again.
    pub async fn run<T, W: Future<Output = RedisResult<T>>>(
        &self,
        work: impl FnOnce(Connection) -> W,
    ) -> Result<T, Failure> {
        let connecting = self.get();
        let result = async {
            let connection = connecting.clone().await.map_err(Failure::Connect)?;
            work(connection).await.map_err(Failure::Command)
        }
        .await;
        if result.as_ref().is_err_and(|failure| failure.judge() == Verdict::Sick) {
            self.failed(&connecting);
        }
        result
    }

    /// Runs `work` on a connection made for it, which is everyone's from then on if that succeeds.
    pub async fn renew<W: Future<Output = RedisResult<()>>>(
        &self,
        work: impl FnOnce(Connection) -> W,
    ) -> Result<(), Failure> {
        let connection = connect(self.target.clone()).await.map_err(Failure::Connect)?;
        work(connection.clone()).await.map_err(Failure::Command)?;
        *self.lock() = Some(async { Ok(connection) }.boxed().shared());
        Ok(())
    }

    pub fn is_cluster(&self) -> bool {
        self.target.is_cluster()
    }

    /// Makes the next call connect anew, unless another did so already. A cluster's nodes fail one by one, and connect again.
    fn failed(&self, failed: &Connecting) {
        let is_alive = matches!(failed.peek(), Some(Ok(Connection::Cluster(_))));
        if is_alive {
            return;
        }
        let mut current = self.lock();
        if current.as_ref().is_some_and(|current| current.ptr_eq(failed)) {
            *current = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Connecting>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn connect(target: Target) -> RedisResult<Connection> {
    match &target {
        Target::Server(client) => {
            let config = AsyncConnectionConfig::new()
                .set_connection_timeout(Some(CONNECT_TIMEOUT))
                .set_response_timeout(Some(RESPONSE_TIMEOUT))
                .set_pipeline_buffer_size(PIPELINE_BUFFER);
            Ok(Connection::Server(client.get_multiplexed_async_connection_with_config(&config).await?))
        }
        Target::Cluster { .. } => {
            let builder = target.cluster_builder().expect("it is a cluster");
            let client =
                builder.connection_timeout(CONNECT_TIMEOUT).response_timeout(RESPONSE_TIMEOUT).retries(1).build()?;
            let connection = tokio::time::timeout(2 * CONNECT_TIMEOUT, client.get_async_connection());
            let late = |_| RedisError::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
            Ok(Connection::Cluster(connection.await.map_err(late)??))
        }
    }
}
