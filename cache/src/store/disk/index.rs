//! What a directory holds, as far as this process knows: sizes and the order of last use, for eviction.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use crate::key::Key;
use crate::store::Kind;

/// File systems hand out blocks: a short file takes one.
const BLOCK_BYTES: u64 = 4096;

/// A file of the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Name {
    pub kind: Kind,
    pub key: Key,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    bytes: u64,
    place: Place,
}

/// Order of last use; the second part tells files of one moment apart.
type Place = (SystemTime, u64);

/// What the files of a kind take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct OfKind {
    pub num_files: u64,
    pub bytes: u64,
}

/// Bounded in bytes on disk and in files.
#[derive(Debug)]
pub(super) struct Index {
    entries: HashMap<Name, Entry>,
    order: BTreeMap<Place, Name>,
    bytes: u64,
    /// By place in [`Kind::ALL`].
    of_kinds: [OfKind; Kind::ALL.len()],
    num_uses: u64,
    max_bytes: u64,
    max_files: usize,
}

impl Index {
    pub fn new(max_bytes: u64, max_files: usize) -> Self {
        Self {
            entries: HashMap::new(),
            order: BTreeMap::new(),
            bytes: 0,
            of_kinds: Default::default(),
            num_uses: 0,
            max_bytes,
            max_files,
        }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn of_kind(&self, kind: Kind) -> OfKind {
        self.of_kinds[kind as usize]
    }

    pub fn contains(&self, name: &Name) -> bool {
        self.entries.contains_key(name)
    }

    /// Notes a file of `bytes` that was used at `time`.
    pub fn note(&mut self, name: Name, bytes: u64, time: SystemTime) {
        self.forget(&name);
        self.num_uses += 1;
        let place = (time, self.num_uses);
        let bytes = bytes.next_multiple_of(BLOCK_BYTES);
        self.entries.insert(name, Entry { bytes, place });
        self.order.insert(place, name);
        self.bytes += bytes;
        let of_kind = &mut self.of_kinds[name.kind as usize];
        of_kind.num_files += 1;
        of_kind.bytes += bytes;
    }

    pub fn forget(&mut self, name: &Name) {
        if let Some(entry) = self.entries.remove(name) {
            self.order.remove(&entry.place);
            self.bytes -= entry.bytes;
            let of_kind = &mut self.of_kinds[name.kind as usize];
            of_kind.num_files -= 1;
            of_kind.bytes -= entry.bytes;
        }
    }

    /// Takes out what was used least recently, while there is too much.
    pub fn pop_excess(&mut self) -> Option<Name> {
        if self.bytes <= self.max_bytes && self.entries.len() <= self.max_files {
            return None;
        }
        let (_, &name) = self.order.first_key_value()?;
        self.forget(&name);
        Some(name)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn name(number: u8) -> Name {
        Name { kind: Kind::Output, key: Key::from_bytes([number; 32]) }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut index = Index::new(3 * BLOCK_BYTES, 100);
        for (number, time) in [(1, 30), (2, 10), (3, 20)] {
            index.note(name(number), 1, at(time));
        }
        assert_eq!((index.pop_excess(), index.bytes()), (None, 3 * BLOCK_BYTES));
        index.note(name(2), 1, at(40));
        index.note(name(4), BLOCK_BYTES + 1, at(50));
        assert_eq!([index.pop_excess(), index.pop_excess(), index.pop_excess()], [Some(name(3)), Some(name(1)), None]);
        assert_eq!((index.len(), index.bytes()), (2, 3 * BLOCK_BYTES));
    }

    #[test]
    fn files_are_bounded_too_and_can_be_forgotten() {
        let mut index = Index::new(u64::MAX, 2);
        for number in 0..3 {
            index.note(name(number), 1, at(0));
        }
        assert_eq!((index.pop_excess(), index.pop_excess()), (Some(name(0)), None));
        assert!(index.contains(&name(2)));
        index.note(Name { kind: Kind::Kv, ..name(2) }, BLOCK_BYTES + 1, at(9));
        assert_eq!((index.of_kind(Kind::Output).num_files, index.of_kind(Kind::Routing)), (2, OfKind::default()));
        assert_eq!(index.of_kind(Kind::Kv), OfKind { num_files: 1, bytes: 2 * BLOCK_BYTES });
        index.forget(&Name { kind: Kind::Kv, ..name(2) });
        assert_eq!(index.of_kind(Kind::Kv), OfKind::default());
        index.forget(&name(2));
        index.forget(&name(1));
        assert_eq!((index.len(), index.bytes()), (0, 0));
    }
}
