//! A TCP proxy that breaks connections where it is told to.

use std::io::{Read, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// What befalls each connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// It ends after so many bytes from the client.
    pub cut_requests_after: Option<usize>,
    /// It ends after so many bytes from the server.
    pub cut_replies_after: Option<usize>,
    /// The first bytes of the server are replaced by these, after so many true ones.
    pub garbage: Option<(usize, Vec<u8>)>,
}

/// Forwards to one address until it is dropped.
pub struct FaultyProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    faults: Mutex<Faults>,
    /// Both sides of the open connections; `None` once the proxy is over.
    streams: Mutex<Option<Vec<TcpStream>>>,
}

impl FaultyProxy {
    /// # Panics
    /// There is no free port.
    pub fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("there is a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::new(Shared { streams: Mutex::new(Some(Vec::new())), ..Shared::default() });
        let acceptor = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, target, &shared)
        });
        Self { address, shared, acceptor: Some(acceptor) }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What befalls connections from now on; those that are open end.
    pub fn set(&self, faults: Faults) {
        *self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner) = faults;
        if let Some(streams) = &mut *self.shared.streams.lock().unwrap_or_else(PoisonError::into_inner) {
            end(streams);
        }
    }
}

impl Drop for FaultyProxy {
    fn drop(&mut self) {
        if let Some(mut streams) = self.shared.streams.lock().unwrap_or_else(PoisonError::into_inner).take() {
            end(&mut streams);
        }
        // Wakes the acceptor, which sees that it is over.
        drop(TcpStream::connect(self.address));
        drop(self.acceptor.take().map(JoinHandle::join));
    }
}

/// A connection whose other side is gone already cannot be shut down, which is as good.
fn end(streams: &mut Vec<TcpStream>) {
    for stream in streams.drain(..) {
        drop(stream.shutdown(Shutdown::Both));
    }
}

fn accept(listener: &TcpListener, target: SocketAddr, shared: &Shared) {
    let mut pumps = Vec::new();
    while let Ok((client, _)) = listener.accept() {
        let faults = shared.faults.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let server = TcpStream::connect(target);
        let mut streams = shared.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(streams) = &mut *streams else { break };
        let Ok(server) = server else { continue };
        let copy = |stream: &TcpStream| stream.try_clone().expect("a socket can be shared");
        streams.extend([copy(&client), copy(&server)]);
        let (requests, replies) = ((copy(&client), copy(&server)), (server, client));
        let garbage = faults.garbage;
        pumps.push(std::thread::spawn(move || pump(requests, faults.cut_requests_after, None)));
        pumps.push(std::thread::spawn(move || pump(replies, faults.cut_replies_after, garbage)));
    }
    for pump in pumps {
        drop(pump.join());
    }
}

/// Copies until one side ends, or is made to, then ends both.
fn pump((mut from, mut to): (TcpStream, TcpStream), limit: Option<usize>, garbage: Option<(usize, Vec<u8>)>) {
    let mut left = limit.unwrap_or(usize::MAX);
    let mut true_bytes = garbage.as_ref().map_or(usize::MAX, |(after, _)| *after);
    let mut buffer = [0; 4096];
    while left > 0 {
        let Ok(count @ 1..) = from.read(&mut buffer) else { break };
        let count = count.min(left);
        left -= count;
        let num_true = count.min(true_bytes);
        true_bytes -= num_true;
        let is_written = to.write_all(&buffer[..num_true]).is_ok()
            && match &garbage {
                Some((_, garbage)) if num_true < count => to.write_all(garbage).is_ok(),
                _ => true,
            };
        if !is_written {
            break;
        }
    }
    for stream in [from, to] {
        drop(stream.shutdown(Shutdown::Both));
    }
}
