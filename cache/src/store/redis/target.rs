//! Which Redis: a server over TCP, TLS or a unix socket, or a cluster.

use redis::TlsCertificates;
use redis::cluster::{ClusterClient, ClusterClientBuilder};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::address;
use crate::error::CacheError;

/// A parsed address. Its password stays out of `Debug`.
#[derive(Clone)]
pub(super) enum Target {
    Server(Box<redis::Client>),
    Cluster { nodes: Vec<redis::ConnectionInfo>, certificates: Option<TlsCertificates> },
}

impl Target {
    /// `redis://`, `rediss://` and `unix://` as Redis's own tools write them, and `redis+cluster://[USER:PASSWORD@]HOST:PORT,…[/]`
    /// (`rediss+cluster://` over TLS) with some nodes of a cluster.
    ///
    /// `ca` holds the certificates, as PEM, of those who may vouch for a server.
    pub fn parse(url: &str, ca: Option<&[u8]>) -> Result<Self, CacheError> {
        address::check(url)?;
        let open = |url: &str| redis::Client::open(url).map_err(|_| address::refused(url));
        let certificates = ca.map(|ca| check_ca(url, ca)).transpose()?;
        let cluster = [("redis+cluster://", "redis"), ("rediss+cluster://", "rediss")];
        let nodes = cluster.iter().find_map(|(prefix, scheme)| Some((url.strip_prefix(prefix)?, scheme)));
        let Some((nodes, scheme)) = nodes else {
            let mut client = open(url)?;
            if let Some(certificates) = certificates {
                client = redis::Client::build_with_tls(url, certificates).map_err(|error| wrong_ca(&error))?;
            }
            return Ok(Self::Server(Box::new(client)));
        };
        let (login, nodes) = match nodes.rsplit_once('@') {
            Some((login, nodes)) => (format!("{login}@"), nodes),
            None => (String::new(), nodes),
        };
        let nodes = nodes.trim_end_matches('/').split(',').map(|node| {
            let client = open(&format!("{scheme}://{login}{node}/"))?;
            Ok(client.get_connection_info().clone())
        });
        let nodes = nodes.collect::<Result<Vec<_>, CacheError>>()?;
        // Refuses now what no node could answer to, such as nodes with unlike passwords.
        let target = Self::Cluster { nodes, certificates };
        let client = target.cluster_builder().expect("it is a cluster").build();
        client.map_err(|error| if ca.is_some() { wrong_ca(&error) } else { address::refused(url) })?;
        Ok(target)
    }

    /// What connects to the cluster; `None` for a server.
    pub fn cluster_builder(&self) -> Option<ClusterClientBuilder> {
        let Self::Cluster { nodes, certificates } = self else { return None };
        let builder = ClusterClient::builder(nodes.clone());
        Some(match certificates {
            None => builder,
            Some(certificates) => builder.certs(certificates.clone()),
        })
    }

    pub fn is_cluster(&self) -> bool {
        matches!(self, Self::Cluster { .. })
    }
}

/// Refuses what would leave a connection without a check, or every connection without hope.
fn check_ca(url: &str, ca: &[u8]) -> Result<TlsCertificates, CacheError> {
    let wrong = |reason: String| CacheError::Ca { reason };
    if !url.starts_with("rediss") {
        return Err(wrong(
            "certificates are for TLS: --redis-url must be a rediss:// or rediss+cluster:// one".to_owned(),
        ));
    }
    let certificates = CertificateDer::pem_slice_iter(ca).collect::<Result<Vec<_>, _>>();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => {}
        Ok(_) => return Err(wrong("expected certificates as PEM, found none".to_owned())),
        Err(error) => return Err(wrong(format!("expected certificates as PEM: {error}"))),
    }
    Ok(TlsCertificates { client_tls: None, root_cert: Some(ca.to_vec()) })
}

/// The client reads the certificates too, and no address.
fn wrong_ca(error: &redis::RedisError) -> CacheError {
    CacheError::Ca { reason: format!("these certificates cannot be used: {error}") }
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = |info: &redis::ConnectionInfo| info.addr().to_string();
        match self {
            Self::Server(client) => f.write_str(&name(client.get_connection_info())),
            Self::Cluster { nodes, .. } => f.debug_list().entries(nodes.iter().map(name)).finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(url: &str) -> String {
        Target::parse(url, None).map_or_else(|error| format!("error: {error}"), |target| format!("{target:?}"))
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

    #[test]
    fn certificates_that_check_nothing_are_refused() {
        let error = |url: &str, ca: &[u8]| Target::parse(url, Some(ca)).map(drop).unwrap_err().to_string();
        assert!(error("redis://host", b"").contains("rediss://"));
        assert!(error("rediss://host", b"no certificate").contains("found none"));
        let broken = b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n";
        for url in ["rediss://host", "rediss+cluster://a:1"] {
            assert!(error(url, broken).contains("PEM"));
        }
        let empty = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(error("rediss://host", empty).contains("trust anchors"));
    }
}
