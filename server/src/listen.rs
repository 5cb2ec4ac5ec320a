//! The accept loop: a bounded number of connections, each with a limit on how long its head may take.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::write_timeout::WriteTimeout;

/// Time a client has for sending a request's head; also how long an idle connection is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);

/// Time a client may leave its answer unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Time the last answers have for leaving after the loop was told to stop.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Accept errors such as "too many open files" last a while; trying again at once would burn a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Binds the listening socket.
///
/// # Errors
/// The address is taken or not this machine's.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves `router` until `stop` is cancelled and the open connections have written what they were writing.
pub async fn serve(listener: TcpListener, router: Router, max_connections: usize, stop: &CancellationToken) {
    let places = Arc::new(Semaphore::new(max_connections));
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let (stream, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let connection = serve_connection(stream, router.clone(), stop.clone());
        connections.spawn(async move {
            connection.await;
            drop(place);
        });
    }
    connections.close();
    if tokio::time::timeout(CLOSE_TIMEOUT, connections.wait()).await.is_err() {
        tracing::warn!(num_connections = connections.len(), "closing connections that do not take their answers");
    }
}

/// Waits for a place first: beyond the limit clients wait in the listen queue.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.expect("the semaphore is never closed");
    let (stream, _) = listener.accept().await?;
    // Tokens are small packets: they must not wait for the acknowledgement of the one before.
    stream.set_nodelay(true)?;
    Ok((stream, place))
}

/// hyper drops the handler, or the body's stream, as soon as the client closes the connection; that aborts the
/// request's generations.
async fn serve_connection(stream: TcpStream, router: Router, stop: CancellationToken) {
    let service = TowerToHyperService::new(router);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(WriteTimeout::new(stream, WRITE_TIMEOUT)), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}
