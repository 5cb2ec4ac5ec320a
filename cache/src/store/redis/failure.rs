//! Why a call came to nothing: what that says about Redis, and what it says to an operator.

use std::fmt;

use redis::{ErrorKind, RedisError, ServerErrorKind};

use crate::circuit::Verdict;
use crate::error::CacheError;

/// Where it failed. Its `Display` is for the log, with a hint where there is one.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    /// Making the connection: without it every call fails, whatever the error's kind.
    Connect(RedisError),
    /// On a connection.
    Command(RedisError),
}

const LOGIN: &str =
    "--redis-url holds its user and password: redis://USER:PASSWORD@HOST:PORT, or redis://:PASSWORD@HOST:PORT";

/// What is found in an error's text, and what to do about it.
const HINTS: &[(&str, &str)] = &[
    (
        "UnknownIssuer",
        "nobody who is trusted vouches for its certificate: --redis-ca-file names the file with the authority's certificate",
    ),
    (
        "CaUsedAsEndEntity",
        "it shows a certificate that is an authority's (CA:TRUE): it needs one of its own that is none, signed by the authority in \
         --redis-ca-file",
    ),
    ("NotValidForName", "its certificate is for another host name than the one in --redis-url"),
    ("cluster support disabled", "it is no cluster: --redis-url takes it as redis://HOST:PORT"),
    ("DB index is out of range", "--redis-url names a database that it does not have; 0 always exists"),
    ("WRONGPASS", LOGIN),
    ("NOAUTH", LOGIN),
    ("AuthenticationFailed", LOGIN),
];

impl Failure {
    /// What it says about the server, or about the way to it.
    pub fn judge(&self) -> Verdict {
        match self {
            Self::Connect(_) => Verdict::Sick,
            Self::Command(error) => judge_command(error),
        }
    }

    fn error(&self) -> &RedisError {
        match self {
            Self::Connect(error) | Self::Command(error) => error,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.error().to_string();
        match HINTS.iter().find(|(part, _)| text.contains(part)) {
            Some((_, hint)) => write!(f, "{text}; hint: {hint}"),
            None => f.write_str(&text),
        }
    }
}

impl From<Failure> for CacheError {
    fn from(failure: Failure) -> Self {
        let (Failure::Connect(error) | Failure::Command(error)) = failure;
        error.into()
    }
}

/// What an error of a command says about the server that gave it, or about the way to it.
pub(super) fn judge_command(error: &RedisError) -> Verdict {
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
            assert_eq!(judge_command(&error), expected, "{line}");
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
        assert_eq!(judge_command(&std::io::Error::from(std::io::ErrorKind::ConnectionReset).into()), Verdict::Sick);
    }
}
