//! Values in a directory: across restarts, and shared by the processes of one machine.
//!
//! | file | what is in it |
//! |---|---|
//! | `files` | reading, writing, evicting and scanning files |
//! | `folder` | blocking work on them from async tasks, and what a folder that fails says |
//! | `health` | whether the folder can be used at all |
//! | `index` | sizes and order of last use |

mod files;
mod folder;
mod health;
mod index;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use futures::future::{BoxFuture, FutureExt as _, try_join_all};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout_at};

use self::files::{Files, Look};
use self::folder::Folder;
use self::index::{Index, Name};
use crate::breaker::BreakerConfig;
use crate::circuit::Circuit;
use crate::error::CacheError;
use crate::store::{Address, Found, Kind, Store, Tier, TierStats, Value, check_ttl};
use crate::telemetry::{self, Call, measured};

/// Where values lie, and how much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    pub directory: PathBuf,
    /// Bytes on disk. Each process counts what it has seen: files of others from the next scan on, or from their use.
    pub max_bytes: u64,
    pub max_value_bytes: usize,
    /// Pause between scans of the directory.
    pub scan_interval: Duration,
    pub breaker: BreakerConfig,
}

/// Files at most, so that the index stays within some 200 MB.
const MAX_FILES: usize = 1_000_000;

/// Files that one call may ask about.
const MAX_ASKED: usize = 64;

/// Calls that may be in the file system at once. A file system that hangs holds these threads and no more.
pub const MAX_CALLS: usize = 16;

/// One file per value. Full, read-only or gone, it costs hits, and is counted; one that hangs is left alone after a few calls.
#[derive(Debug)]
pub struct DiskStore {
    circuit: Circuit<Arc<Folder>>,
    /// One permit per call about a KV block: they come by the dozen, and take half of [`MAX_CALLS`] at most.
    bulk: Semaphore,
    max_bytes: u64,
    max_value_bytes: usize,
}

impl DiskStore {
    /// Takes in what the directory holds in the background, again and again while the store lives. Call within a runtime.
    ///
    /// # Errors
    /// The directory cannot be made: said once, at the start, where an operator reads it.
    pub fn open(config: DiskConfig) -> Result<Self, CacheError> {
        files::make_folder(&config.directory)
            .map_err(|error| CacheError::Folder { reason: health::explain(&error) })?;
        let index = Index::new(config.max_bytes, MAX_FILES);
        let folder = Arc::new(Folder::new(Files::new(config.directory, config.max_value_bytes, index)));
        tokio::spawn(scan_for_ever(Arc::downgrade(folder.files()), config.scan_interval));
        Ok(Self {
            circuit: Circuit::new(folder, config.breaker),
            bulk: Semaphore::new(MAX_CALLS / 2),
            max_bytes: config.max_bytes,
            max_value_bytes: config.max_value_bytes,
        })
    }

    /// Runs blocking work; what is not done by the deadline goes on alone, within [`MAX_CALLS`].
    async fn call<T: Send + 'static>(
        &self,
        deadline: Instant,
        work: impl FnOnce(&Files) -> io::Result<T> + Send + 'static,
    ) -> Result<T, CacheError> {
        let folder = self.folder();
        let result = self.circuit.call(deadline, folder.run(work)).await;
        if let Err(CacheError::Disk(error)) = &result {
            folder.suspect(error);
        }
        result
    }

    /// Waits until it is the turn of a call about a value of `kind`.
    async fn turn(&self, kind: Kind, deadline: Instant) -> Result<Option<SemaphorePermit<'_>>, CacheError> {
        // While the folder is left alone nothing waits.
        if kind != Kind::Kv || self.circuit.is_open() {
            return Ok(None);
        }
        match timeout_at(deadline, self.bulk.acquire()).await {
            Ok(permit) => Ok(Some(permit.expect("the semaphore is never closed"))),
            Err(_) => Err(CacheError::Timeout { tier: Tier::Disk }),
        }
    }

    fn folder(&self) -> &Arc<Folder> {
        self.circuit.place()
    }

    async fn find(&self, address: &Address, deadline: Instant) -> Result<Option<Found>, CacheError> {
        let _turn = self.turn(address.kind, deadline).await?;
        let wanted = *address;
        match self.call(deadline, move |files| files.read(&wanted, SystemTime::now())).await? {
            Look::Found(opened) => Ok(Some(Found { payload: opened.payload, tier: Tier::Disk, ttl: opened.ttl })),
            Look::Missing | Look::Expired => Ok(None),
            Look::Bad(bad) => {
                telemetry::bad_value(&bad, Tier::Disk, address.kind);
                Ok(None)
            }
        }
    }

    async fn keep(&self, address: &Address, value: Value, deadline: Instant) -> Result<(), CacheError> {
        check_ttl(value.ttl)?;
        let (bytes, limit) = (value.payload.len(), self.max_value_bytes);
        if bytes > limit {
            return Err(CacheError::TooLarge { tier: Tier::Disk, bytes, limit });
        }
        let address = *address;
        let _turn = self.turn(address.kind, deadline).await?;
        self.call(deadline, move |files| files.write(&address, &value, SystemTime::now())).await?;
        telemetry::written(Tier::Disk, address.kind, bytes);
        Ok(())
    }
}

impl Store for DiskStore {
    fn get<'a>(&'a self, address: &'a Address, deadline: Instant) -> BoxFuture<'a, Result<Option<Found>, CacheError>> {
        measured(Call::Get, Tier::Disk, address.kind, self.find(address, deadline)).boxed()
    }

    fn put<'a>(
        &'a self,
        address: &'a Address,
        value: Value,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<(), CacheError>> {
        measured(Call::Put, Tier::Disk, address.kind, self.keep(address, value, deadline)).boxed()
    }

    fn remove<'a>(&'a self, address: &'a Address, deadline: Instant) -> BoxFuture<'a, Result<(), CacheError>> {
        let name = Name { kind: address.kind, key: address.key };
        self.call(deadline, move |files| files.remove(&name)).boxed()
    }

    fn contains_many<'a>(
        &'a self,
        addresses: &'a [Address],
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Vec<bool>, CacheError>> {
        let calls = addresses.chunks(MAX_ASKED).map(|addresses| {
            let names: Vec<_> = addresses.iter().map(|address| Name { kind: address.kind, key: address.key }).collect();
            self.call(deadline, move |files| {
                names.iter().map(|name| files.contains(name)).collect::<io::Result<Vec<_>>>()
            })
        });
        let answers = try_join_all(calls);
        async { Ok(answers.await?.concat()) }.boxed()
    }

    fn clear(&self, kind: Option<Kind>, deadline: Instant) -> BoxFuture<'_, Result<(), CacheError>> {
        self.call(deadline, move |files| {
            let mut kinds = Kind::ALL.into_iter().filter(|each| kind.is_none_or(|kind| kind == *each));
            kinds.try_for_each(|kind| files.clear(kind, || Instant::now() >= deadline))
        })
        .boxed()
    }

    fn check(&self) -> BoxFuture<'_, ()> {
        self.circuit.check().boxed()
    }

    fn stats(&self, _: Instant) -> BoxFuture<'_, Vec<TierStats>> {
        async {
            let index = self.folder().files().index();
            vec![TierStats {
                tier: Tier::Disk,
                is_available: !self.circuit.is_open() && !self.folder().health().is_unusable(),
                num_entries: Some(index.len() as u64),
                bytes: Some(index.bytes()),
                max_bytes: Some(self.max_bytes),
            }]
        }
        .boxed()
    }

    fn stats_of(&self, kind: Kind, deadline: Instant) -> BoxFuture<'_, Vec<TierStats>> {
        async move {
            let of_kind = self.folder().files().index().of_kind(kind);
            let (num_entries, bytes) = (Some(of_kind.num_files), Some(of_kind.bytes));
            self.stats(deadline).await.into_iter().map(|row| TierStats { num_entries, bytes, ..row }).collect()
        }
        .boxed()
    }
}

async fn scan_for_ever(files: Weak<Files>, interval: Duration) {
    loop {
        let Some(files) = files.upgrade() else { return };
        let scan = tokio::task::spawn_blocking(move || files.scan(SystemTime::now()));
        if let Ok(Err(error)) = scan.await {
            tracing::warn!(%error, "the cache directory cannot be scanned");
        }
        tokio::time::sleep(interval).await;
    }
}
