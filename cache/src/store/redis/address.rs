//! What the address of a Redis looks like, and what is wrong with one, in words that give away neither user nor password.

use crate::error::CacheError;

/// What an address may be.
const EXPECTED: &str = "expected redis://HOST:PORT, rediss://HOST:PORT (TLS), unix:///PATH or redis+cluster://HOST:PORT,HOST:PORT, for \
     example redis://127.0.0.1:6379";

/// As the client reads them; those of Valkey mean the same.
const SCHEMES: [&str; 9] =
    ["redis", "rediss", "valkey", "valkeys", "unix", "redis+unix", "valkey+unix", "redis+cluster", "rediss+cluster"];

/// Nodes of a cluster that an address may name: a few are enough to find the rest.
const MAX_NODES: usize = 64;

/// Refuses an address that is none, before the client does in its own words.
pub(super) fn check(url: &str) -> Result<(), CacheError> {
    explain(url).map_or(Ok(()), |reason| Err(CacheError::Url { reason }))
}

/// For an address that passed [`check`] and that the client does not take all the same.
pub(super) fn refused(url: &str) -> CacheError {
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    let host = authority(rest).rsplit_once('@').map_or(authority(rest), |(_, host)| host);
    let host = host.split(':').next().unwrap_or_default();
    CacheError::Url { reason: format!("{scheme}://{host}: not an address of Redis; {EXPECTED}") }
}

/// What is wrong with it.
fn explain(url: &str) -> Option<String> {
    let Some((scheme, rest)) = url.split_once("://") else {
        return Some(format!("no scheme such as redis:// at its start; {EXPECTED}"));
    };
    if !SCHEMES.contains(&scheme) {
        // What is no scheme may be anything, a password too.
        let is_scheme = scheme.len() <= 16 && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
        let scheme = if is_scheme { format!("{scheme}://") } else { "its scheme".to_owned() };
        return Some(format!("{scheme} is no scheme of Redis; {EXPECTED}"));
    }
    if rest.contains("#insecure") {
        return Some(format!(
            "{scheme}://…#insecure would take any server for the right one; hint: --redis-ca-file names the \
             authority that vouches for it"
        ));
    }
    if scheme.ends_with("unix") {
        let is_path = rest.starts_with('/');
        return (!is_path).then(|| {
            format!("{scheme}:// wants the whole path of a socket, such as {scheme}:///run/redis/redis.sock, with three slashes")
        });
    }
    if rest.contains('#') || rest[authority(rest).len()..].contains('@') {
        return Some(format!(
            "{scheme}://…: a `#`, `/`, `?` or `@` in a user or a password is written %23, %2F, %3F or %40"
        ));
    }
    let hosts = authority(rest).rsplit_once('@').map_or(authority(rest), |(_, hosts)| hosts);
    if scheme.ends_with("+cluster") {
        let nodes: Vec<_> = hosts.split(',').collect();
        if nodes.len() > MAX_NODES || nodes.iter().any(|node| node.is_empty()) {
            return Some(format!("{scheme}:// expects HOST:PORT,HOST:PORT,… with 1 to {MAX_NODES} nodes"));
        }
        return nodes.iter().find_map(|node| explain_host(scheme, node));
    }
    explain_host(scheme, hosts).or_else(|| {
        let path = rest[authority(rest).len()..].split('?').next().unwrap_or_default().trim_matches('/');
        let is_number = path.is_empty() || path.parse::<u32>().is_ok();
        (!is_number).then(|| {
            format!("{scheme}://…/: after the host goes the number of a database, such as {scheme}://HOST:6379/0, or nothing")
        })
    })
}

/// What stands before path and query: login, hosts and ports.
fn authority(rest: &str) -> &str {
    rest.split(['/', '?', '#']).next().unwrap_or_default()
}

/// What is wrong with `HOST` or `HOST:PORT`. The port is not repeated: where the host is forgotten, it is a password.
fn explain_host(scheme: &str, node: &str) -> Option<String> {
    // An IPv6 address stands in brackets.
    let port_from = node.rfind(']').unwrap_or_default();
    let (host, port) = match node[port_from..].split_once(':') {
        Some((_, port)) => (&node[..node.len() - port.len() - 1], Some(port)),
        None => (node, None),
    };
    if host.is_empty() {
        return Some(format!("{scheme}:// without a host; {EXPECTED}"));
    }
    if port.is_some_and(|port| port.parse::<u16>().is_ok_and(|port| port > 0)) || port.is_none() {
        return None;
    }
    Some(format!(
        "{scheme}://{host}: the port after it is none, expected a number of 1 to 65535, for example {scheme}://{host}:6379"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_is_named_and_no_login_is() {
        let check = |url: &str, parts: &[&str]| {
            let reason = explain(url).unwrap_or_else(|| panic!("{url} is taken"));
            assert!(parts.iter().all(|part| reason.contains(part)), "{url}: {reason}");
            assert!(!["secret", "hunter", "alice"].iter().any(|part| reason.contains(part)), "{url}: {reason}");
        };
        check("garbage", &["no scheme", "redis://127.0.0.1:6379", "unix:///PATH", "rediss://", "redis+cluster://"]);
        check("alice:secret@host:6379", &["no scheme"]);
        check("http://localhost", &["http:// is no scheme of Redis", "redis://127.0.0.1:6379"]);
        check("secret!@x://localhost", &["its scheme is no scheme"]);
        check("redis://127.0.0.1:99999", &["redis://127.0.0.1", "1 to 65535"]);
        check("redis://alice:secret@[::1]:0", &["redis://[::1]", "1 to 65535"]);
        check("redis://host:secret", &["redis://host", "1 to 65535"]);
        check("redis://:secret", &["without a host"]);
        check("redis://alice:sec/hunter@host", &["%2F"]);
        check("redis://alice:sec#hunter@host", &["%23"]);
        check("rediss://alice:secret@host:6379/#insecure", &["#insecure", "--redis-ca-file"]);
        check("rediss+cluster://a:1,b:2/#insecure", &["#insecure"]);
        check("redis://alice:secret@host/hunter2", &["number of a database"]);
        check("unix://nope.sock", &["unix:///", "three slashes"]);
        check("redis+cluster://alice:secret@", &["HOST:PORT,HOST:PORT"]);
        check("redis+cluster://a:1,b:x", &["redis+cluster://b", "1 to 65535"]);
        for url in [
            "redis://alice:p%2F@host:7000/2?protocol=resp3",
            "rediss://host",
            "redis://[::1]:6379/",
            "redis://[::1]",
            "unix:///run/redis.sock?db=1",
            "valkey://host",
            "redis+cluster://:secret@a:1,b:2/",
        ] {
            assert_eq!(explain(url), None);
        }
    }
}
