//! Which Redis: a server over TCP, TLS or a unix socket, or a cluster.

use redis::cluster::ClusterClient;

use crate::error::CacheError;

/// Nodes of a cluster that an address may name: a few are enough to find the rest.
const MAX_NODES: usize = 64;

/// A parsed address. Its password stays out of `Debug`.
#[derive(Clone)]
pub(super) enum Target {
    Server(Box<redis::Client>),
    Cluster(Vec<redis::ConnectionInfo>),
}

impl Target {
    /// `redis://`, `rediss://` and `unix://` as Redis's own tools write them, and `redis+cluster://[USER:PASSWORD@]HOST:PORT,…[/]`
    /// (`rediss+cluster://` over TLS) with some nodes of a cluster.
    pub fn parse(url: &str) -> Result<Self, CacheError> {
        let cluster = [("redis+cluster://", "redis"), ("rediss+cluster://", "rediss")];
        let nodes = cluster.iter().find_map(|(prefix, scheme)| Some((url.strip_prefix(prefix)?, scheme)));
        let Some((nodes, scheme)) = nodes else {
            return Ok(Self::Server(Box::new(redis::Client::open(url).map_err(CacheError::url)?)));
        };
        let (login, nodes) = match nodes.rsplit_once('@') {
            Some((login, nodes)) => (format!("{login}@"), nodes),
            None => (String::new(), nodes),
        };
        let nodes: Vec<_> = nodes.trim_end_matches('/').split(',').collect();
        if nodes.len() > MAX_NODES || nodes.iter().any(|node| node.is_empty()) {
            return Err(CacheError::Url { reason: format!("expected HOST:PORT,… with 1 to {MAX_NODES} nodes") });
        }
        let nodes = nodes.iter().map(|node| {
            let url = format!("{scheme}://{login}{node}/");
            redis::Client::open(url).map(|client| client.get_connection_info().clone()).map_err(CacheError::url)
        });
        let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
        // Refuses now what no node could answer to, such as nodes with unlike passwords.
        ClusterClient::new(nodes.clone()).map_err(CacheError::url)?;
        Ok(Self::Cluster(nodes))
    }

    pub fn is_cluster(&self) -> bool {
        matches!(self, Self::Cluster(_))
    }
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = |info: &redis::ConnectionInfo| info.addr().to_string();
        match self {
            Self::Server(client) => f.write_str(&name(client.get_connection_info())),
            Self::Cluster(nodes) => f.debug_list().entries(nodes.iter().map(name)).finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(url: &str) -> String {
        Target::parse(url).map_or_else(|error| format!("error: {error}"), |target| format!("{target:?}"))
    }

    #[test]
    fn addresses_are_read_and_shown_without_passwords() {
        assert_eq!(shown("redis://user:secret@host:7000/2"), "host:7000");
        assert_eq!(shown("rediss://host"), "host:6379");
        assert_eq!(shown("unix:///run/redis.sock"), "/run/redis.sock");
        assert_eq!(shown("redis+cluster://:secret@a:1,b:2/"), "[\"a:1\", \"b:2\"]");
        assert_eq!(shown("rediss+cluster://a:1"), "[\"a:1\"]");
    }

    #[test]
    fn addresses_that_nothing_can_be_at_are_refused() {
        for url in ["", "host:6379", "http://host", "redis+cluster://", "redis+cluster://a:1,,b:2", "redis://h:x"] {
            assert!(shown(url).starts_with("error: "), "{url}: {}", shown(url));
        }
        let error = shown("redis+cluster://:secret@a:notaport");
        assert!(error.starts_with("error: ") && !error.contains("secret"), "{error}");
    }
}
