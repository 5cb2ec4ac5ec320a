//! Tiers that hang, are full, or are not who they say: every request is answered, in time, and the tier is used again once it is well.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::redis::{RedisServer, free_address};
use harness::replica::{MODEL, NUM_VALUES, PATIENT, Question, Replica};
use harness::server::on_full_disks;
use harness::{Folder, PATIENCE, Server, golden, poll};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::json;

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");

/// One that has no memory of its own: every answer that it has computed before comes from a slow tier.
fn forgetful(args: &[&str]) -> Replica {
    forgetful_by(SERVER, args)
}

fn forgetful_by(program: &str, args: &[&str]) -> Replica {
    Replica::start(program, &golden::folder(MODEL), &[args, &["--output-cache-memory", "0"]].concat())
}

/// The one file of a value, once it is there.
fn value_file(directory: &Path) -> PathBuf {
    poll("a value on disk", PATIENCE, || {
        let folders = std::fs::read_dir(directory.join("output")).ok()?;
        let files = folders.flat_map(|folder| std::fs::read_dir(folder.expect("it can be listed").path()));
        let paths = files.flatten().map(|file| file.expect("it can be listed").path());
        paths.into_iter().find(|path| path.extension().is_none())
    })
}

/// The line of the log that warns of `what`, once it is there.
fn warning(replica: &Replica, what: &str) -> String {
    poll(what, PATIENCE, || {
        let log = replica.server.process.output();
        log.lines().find(|line| line.contains(what) && line.contains("WARN")).map(str::to_owned)
    })
}

/// What a server says that does not start.
fn refused(args: &[&str]) -> String {
    let (status, output) = Server::fail(SERVER, &golden::folder(MODEL), args);
    assert!(!status.success());
    output
}

fn is_up(replica: &Replica, tier: &str) -> bool {
    replica.metric("moesaic_cache_up", &[("tier", tier)]) == 1.0
}

#[test]
fn a_disk_that_hangs_delays_a_few_requests_and_fails_none() {
    let folder = Folder::new("hangs");
    let replica = forgetful(&["--output-cache", "disk", "--cache-dir", folder.arg()]);
    let question = Question::of(0);
    // What is written would take the place of the file that hangs.
    let look = || {
        let mut body = question.body();
        body["cache"] = json!({"write": false});
        let answer = replica.server.post(question.path(), &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.json()["choices"], replica.computed[0]);
        answer.header("x-moesaic-cache").expect("it was looked for").to_owned()
    };
    assert_eq!(replica.ask(&question), "miss");
    let file = value_file(&folder);
    poll("a hit", PATIENCE, || (look() == "hit").then_some(()));
    std::fs::remove_file(&file).expect("it is there");
    // Whoever opens it for reading hangs until there is a writer.
    assert!(Command::new("mkfifo").arg(&file).status().expect("there is mkfifo").success());
    poll("as many calls that hang as there may be", PATIENCE, || {
        assert_eq!(look(), "miss");
        (replica.num_errors("disk") >= cache::store::MAX_DISK_CALLS as f64 && replica.circuit_is_open()).then_some(())
    });
    let before = replica.num_errors("disk");
    for _ in 0..20 {
        assert_eq!(look(), "miss");
    }
    assert_eq!(replica.num_errors("disk"), before, "it is not even tried");
    assert!(replica.circuit_is_open() && replica.metric("moesaic_cache_up", &[("tier", "disk")]) == 0.0);
    drop(std::fs::File::options().write(true).open(&file).expect("it can be written"));
    poll("a hit again", PATIENCE, || (replica.ask(&question) == "hit").then_some(()));
    assert!(!replica.circuit_is_open());
    let log = replica.server.process.output();
    assert!(log.contains("the cache directory fails") && log.contains("the cache directory answers again"), "{log}");
}

/// A disk with room for a few values, where this machine lets one be made.
struct SmallDisk {
    folder: Folder,
    is_mounted: bool,
}

impl SmallDisk {
    fn new() -> Self {
        let folder = Folder::new("small-disk");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=128k", "tmpfs", folder.arg()]);
        let is_mounted = mount.output().is_ok_and(|output| output.status.success());
        if !is_mounted {
            println!("no small disk can be mounted here: the limit on the size of a file stands in for it");
        }
        Self { folder, is_mounted }
    }

    fn ballast(&self) -> PathBuf {
        self.folder.join("ballast")
    }

    /// Leaves room for nothing.
    fn fill(&self, server: &Server) {
        if self.is_mounted {
            let full = std::fs::write(self.ballast(), vec![0; 1 << 20]);
            assert_eq!(full.expect_err("it is small").kind(), std::io::ErrorKind::StorageFull);
        } else {
            server.process.limit_files("0");
        }
    }

    fn make_room(&self, server: &Server) {
        if self.is_mounted {
            std::fs::remove_file(self.ballast()).expect("it is there");
        } else {
            server.process.limit_files("unlimited");
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if self.is_mounted {
            // Lazily: the server may still hold it.
            drop(Command::new("umount").args(["-l", self.folder.arg()]).status());
        }
    }
}

#[test]
fn a_full_disk_keeps_what_it_has_and_takes_more_when_there_is_room() {
    let disk = SmallDisk::new();
    let folder = Folder::new("script");
    let args = [&PATIENT[..], &["--output-cache", "disk", "--cache-dir", disk.folder.arg()]].concat();
    let replica = forgetful_by(&on_full_disks(SERVER, &folder), &args);
    replica.assert_all("miss");
    poll("all answers on disk", PATIENCE, || {
        let kept = replica.metric("moesaic_cache_entries", &[("tier", "disk")]);
        (kept == NUM_VALUES as f64).then_some(())
    });
    disk.fill(&replica.server);
    for number in 1..=10 {
        assert_eq!(replica.ask(&Question::fresh()), "miss");
        poll("a write that is counted as failed", PATIENCE, || {
            (replica.num_errors("disk") == f64::from(number)).then_some(())
        });
    }
    replica.assert_all("hit");
    assert!(!replica.circuit_is_open(), "it is read all the same");
    assert!(replica.server.process.output().contains("the cache directory refuses"));
    disk.make_room(&replica.server);
    let late = Question::fresh();
    poll("an answer that is kept again", PATIENCE, || (replica.ask(&late) == "hit").then_some(()));
}

/// Who vouches for servers.
fn authority(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).expect("there are no names to be wrong");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let key = KeyPair::generate().expect("keys can be made");
    CertifiedIssuer::self_signed(params, key).expect("it signs itself")
}

#[test]
fn redis_over_tls_is_used_where_the_right_authority_vouches_for_it_and_nowhere_else() {
    let folder = Folder::new("tls");
    let write = |name: &str, text: String| {
        std::fs::write(folder.file(name), text).expect("temporary files can be written");
        folder.file(name)
    };
    let (right, wrong) = (authority("right"), authority("wrong"));
    let key = KeyPair::generate().expect("keys can be made");
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("it is an address");
    let certificate = certificate.signed_by(&key, &right).expect("it can be signed");
    let (right, wrong) = (write("right.pem", right.pem()), write("wrong.pem", wrong.pem()));
    let (certificate, key) = (write("server.pem", certificate.pem()), write("server.key", key.serialize_pem()));
    let address = free_address();
    let port = address.port().to_string();
    let files = ["--tls-cert-file", &certificate, "--tls-key-file", &key, "--tls-ca-cert-file", &right];
    let redis = RedisServer::with_options(&[&["--tls-port", &port, "--tls-auth-clients", "no"], &files[..]].concat());
    let url = format!("rediss://{address}/");
    let start =
        |ca: &[&str]| forgetful(&[&PATIENT[..], &["--output-cache", "redis", "--redis-url", &url], ca].concat());
    let first = start(&["--redis-ca-file", &right]);
    first.assert_all("miss");
    redis.keys_of("output", NUM_VALUES);
    start(&["--redis-ca-file", &right]).assert_all("hit");
    // Another's certificates, and those of the system. That it cannot be used is said before the first request.
    for ca in [&["--redis-ca-file", &wrong][..], &[]] {
        let replica = start(ca);
        let line = warning(&replica, "Redis fails");
        assert!(line.contains("UnknownIssuer") && line.contains("hint") && line.contains("--redis-ca-file"), "{line}");
        assert!(replica.circuit_is_open());
        replica.assert_all("miss");
    }
    assert_eq!(redis.keys().len(), NUM_VALUES);
    let tls = ["--output-cache", "redis", "--redis-url", &url, "--redis-ca-file"];
    assert!(refused(&[&tls[..], &[&folder.file("nowhere")]].concat()).contains("--redis-ca-file"));
    assert!(refused(&[&tls[..], &[&key]].concat()).contains("found none"));
    let plain = redis.url();
    let plain = ["--output-cache", "redis", "--redis-url", &plain, "--redis-ca-file", &right];
    let error = refused(&plain);
    assert!(error.contains("--redis-ca-file: ") && error.contains("rediss://"), "{error}");
    assert!(refused(&["--output-cache", "memory", "--redis-ca-file", &right]).contains("redis_url"));
}

#[test]
fn an_authority_that_serves_with_its_own_certificate_is_told_so() {
    let folder = Folder::new("tls-authority");
    let both = authority("both");
    let (certificate, key) = (folder.file("both.pem"), folder.file("both.key"));
    std::fs::write(&certificate, both.pem()).expect("temporary files can be written");
    std::fs::write(&key, both.key().serialize_pem()).expect("temporary files can be written");
    let address = free_address();
    let port = address.port().to_string();
    let files = ["--tls-cert-file", &certificate, "--tls-key-file", &key, "--tls-ca-cert-file", &certificate];
    let _redis = RedisServer::with_options(&[&["--tls-port", &port, "--tls-auth-clients", "no"], &files[..]].concat());
    let url = format!("rediss://{address}/");
    let replica = forgetful(&["--output-cache", "redis", "--redis-url", &url, "--redis-ca-file", &certificate]);
    let line = warning(&replica, "Redis fails");
    assert!(line.contains("CaUsedAsEndEntity") && line.contains("CA:TRUE"), "{line}");
}

#[test]
fn a_redis_that_cannot_be_used_is_one_warning_at_the_start() {
    let redis = RedisServer::start();
    let address = redis.address();
    for (url, reason) in [
        (format!("redis://{address}/99"), "0 always exists"),
        (format!("redis+cluster://{address}"), "redis://HOST:PORT"),
        (format!("redis://:hunter2@{address}"), "redis://:PASSWORD@"),
        (format!("redis://{}", free_address()), "refused"),
    ] {
        let replica = forgetful(&[&PATIENT[..], &["--output-cache", "redis", "--redis-url", &url]].concat());
        let line = warning(&replica, "Redis fails");
        assert!(line.contains(reason) && !line.contains("hunter2"), "{url}: {line}");
        assert!(replica.circuit_is_open() && !is_up(&replica, "redis"), "{url}");
        replica.assert_all("miss");
        let log = replica.server.process.output();
        assert_eq!(log.lines().filter(|line| line.contains("WARN") && line.contains("Redis")).count(), 1, "{log}");
        assert!(log.contains("answers are looked for in memory, Redis"), "{log}");
    }
}

#[test]
fn a_folder_that_turns_into_a_file_is_down_until_it_is_a_folder_again() {
    let folder = Folder::new("file");
    let cache_dir = folder.file("cache");
    let replica = forgetful(&[&PATIENT[..], &["--output-cache", "disk", "--cache-dir", &cache_dir]].concat());
    assert_eq!(replica.ask(&Question::of(0)), "miss");
    value_file(Path::new(&cache_dir));
    assert!(is_up(&replica, "disk"));
    std::fs::rename(&cache_dir, folder.file("aside")).expect("it is there");
    std::fs::write(&cache_dir, "").expect("temporary files can be written");
    assert_eq!(replica.ask(&Question::of(0)), "miss");
    let line = warning(&replica, "the cache directory cannot be used");
    assert!(line.contains("is a file and a folder is needed"), "{line}");
    assert!(!is_up(&replica, "disk"));
    replica.assert_all("miss");
    std::fs::remove_file(&cache_dir).expect("it is there");
    std::fs::rename(folder.file("aside"), &cache_dir).expect("it is there");
    poll("a folder that can be used", PATIENCE, || is_up(&replica, "disk").then_some(()));
    assert_eq!(replica.ask(&Question::of(0)), "hit");
    assert!(replica.server.process.output().contains("the cache directory can be used again"));
}

#[test]
fn a_folder_that_may_not_be_written_is_one_warning_at_the_start_and_read_all_the_same() {
    let folder = Folder::new("unwritable");
    let cache_dir = folder.file("cache");
    let args = [&PATIENT[..], &["--output-cache", "disk", "--cache-dir", &cache_dir]].concat();
    let first = forgetful(&args);
    assert_eq!(first.ask(&Question::of(0)), "miss");
    let value = value_file(Path::new(&cache_dir));
    drop(first);
    // Root may write everywhere unless it gives that right up.
    let rights = "-dac_override,-dac_read_search";
    let drop_rights = format!("exec setpriv --bounding-set={rights} --inh-caps={rights} {SERVER} \"$@\"");
    let script = folder.script(&format!("[ $(id -u) = 0 ] && {drop_rights}\nexec {SERVER} \"$@\""));
    let outputs = Path::new(&cache_dir).join("output");
    let allow = |mode| {
        let inner = [Path::new(&cache_dir), &outputs, value.parent().expect("it lies in a folder")];
        // Where the probe would make its own file, too.
        std::fs::create_dir_all(outputs.join("00")).expect("there is room");
        for path in inner.into_iter().chain([&*outputs.join("00")]) {
            std::fs::set_permissions(path, Permissions::from_mode(mode)).expect("it is there");
        }
    };
    allow(0o500);
    let replica = forgetful_by(&script, &args);
    let line = warning(&replica, "the cache directory cannot be used");
    assert!(line.contains("Permission denied") && line.contains("hint: the user that runs the server"), "{line}");
    assert!(!is_up(&replica, "disk"));
    assert_eq!(replica.ask(&Question::of(0)), "hit");
    assert_eq!(replica.ask(&Question::fresh()), "miss");
    assert!(!replica.circuit_is_open() && !is_up(&replica, "disk"));
    let log = replica.server.process.output();
    assert_eq!(
        log.lines().filter(|line| line.contains("WARN") && line.contains("cache directory")).count(),
        1,
        "{log}"
    );
    allow(0o700);
    poll("a folder that can be used", PATIENCE, || is_up(&replica, "disk").then_some(()));
}

#[test]
fn settings_that_no_tier_can_have_are_refused_with_what_was_expected() {
    let redis = |url: &str| refused(&["--output-cache", "redis", "--redis-url", url]);
    for (url, parts) in [
        ("garbage", ["no scheme", "unix:///PATH"]),
        ("http://localhost", ["http:// is no scheme", "redis://127.0.0.1:6379"]),
        ("redis://bob:hunter2@127.0.0.1:99999", ["redis://127.0.0.1: ", "1 to 65535"]),
        ("unix://nope.sock", ["unix:///", "three slashes"]),
        ("rediss://bob:hunter2@127.0.0.1/#insecure", ["#insecure", "--redis-ca-file"]),
        ("redis://bob:hunter2@0.0.0.0", ["redis://0.0.0.0: ", "redis://127.0.0.1:6379"]),
    ] {
        let error = redis(url);
        assert!(error.contains("--redis-url: ") && parts.iter().all(|part| error.contains(part)), "{url}: {error}");
        assert!(
            !error.contains("InvalidClientConfig") && !error.contains("hunter2") && !error.contains("bob"),
            "{error}"
        );
    }
    let prefix = refused(&["--output-cache", "redis", "--redis-url", "redis://127.0.0.1", "--redis-prefix", "a b"]);
    assert!(prefix.contains("--redis-prefix: expected 1 to 64 of") && !prefix.contains("--redis-url"), "{prefix}");

    let folder = Folder::new("no-folder");
    let file = folder.file("afile");
    std::fs::write(&file, "").expect("temporary files can be written");
    for path in [file.clone(), format!("{file}/inside")] {
        let error = refused(&["--output-cache", "disk", "--cache-dir", &path]);
        let parts = ["--cache-dir", &path, "is a file and a folder is needed", "hint"];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}
