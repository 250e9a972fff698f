//! What is refused, whatever the daemon says.

use super::*;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

struct Place {
    _folder: tempfile::TempDir,
    path: PathBuf,
    rules: Rules,
}

/// `images/` is allowed, `secret` lies beside it.
fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap();
    fs::create_dir(path.join("images")).unwrap();
    fs::write(path.join("images/disk"), [1; 512]).unwrap();
    fs::write(path.join("secret"), "secret").unwrap();
    let rules = Rules {
        allowed: vec![path.join("images")],
        own: vec![path.join("run")],
        user: nix::unistd::geteuid().as_raw(),
        ..Rules::default()
    };
    Place { _folder: folder, path, rules }
}

const READ: How = How { write: false, direct: false, exclusive: false };
const WRITE: How = How { write: true, ..READ };

#[test]
fn a_store_below_an_allowed_folder_is_opened_as_asked_and_nothing_else() {
    let place = place();
    let disk = place.path.join("images/disk");
    let (real, file) = store(&place.rules, &disk, READ).unwrap();
    assert_eq!(real, disk);
    assert!(nix::unistd::write(&file, b"x").is_err(), "opened for writing");
    let (_, file) = store(&place.rules, &disk, WRITE).unwrap();
    assert_eq!(nix::unistd::write(&file, b"x"), Ok(1));
    assert_eq!(fs::metadata(&disk).unwrap().len(), 512, "cut");
    let said = store(&place.rules, &place.path.join("secret"), READ).unwrap_err();
    assert!(said.errno == 0 && said.reason.contains("store.allowed"), "{said:?}");
    let said = store(&place.rules, &place.path.join("images/none"), WRITE).unwrap_err();
    assert_eq!(said.errno, libc::ENOENT);
    assert!(!place.path.join("images/none").exists(), "made");
    for odd in ["images", "images/..", "images/../secret"] {
        assert!(store(&place.rules, &place.path.join(odd), READ).is_err(), "{odd}");
    }
}

#[test]
fn links_lead_nowhere_out_of_the_folder() {
    let place = place();
    let images = place.path.join("images");
    symlink("disk", images.join("inside")).unwrap();
    symlink("../secret", images.join("last")).unwrap();
    symlink("..", images.join("up")).unwrap();
    symlink(place.path.join("secret"), images.join("absolute")).unwrap();
    symlink("/proc/self/fd/0", images.join("magic")).unwrap();
    assert_eq!(store(&place.rules, &images.join("inside"), READ).unwrap().0, images.join("disk"));
    for link in ["last", "up/secret", "absolute", "magic"] {
        let said = store(&place.rules, &images.join(link), READ).unwrap_err();
        assert!(said.errno == 0 && said.reason.contains("leads out of"), "{link}: {said:?}");
    }
    // the operator's own word is followed
    let named = Rules { named: vec![(images.join("last"), false)], ..place.rules.clone() };
    assert_eq!(store(&named, &images.join("last"), READ).unwrap().0, place.path.join("secret"));
    assert!(store(&named, &images.join("last"), WRITE).is_err());
}

#[test]
fn of_files_that_are_missing_the_ssd_tiers_alone_is_made_and_nothing_in_its_place_is_followed() {
    let place = place();
    let tier = place.path.join("images/tier");
    let rules = Rules { tier: Some(tier.clone()), ..place.rules.clone() };
    assert_eq!(store(&rules, &tier, READ).unwrap_err().errno, libc::ENOENT);
    assert_eq!(store(&rules, &place.path.join("images/other"), WRITE).unwrap_err().errno, libc::ENOENT);
    symlink(place.path.join("elsewhere"), &tier).unwrap();
    assert_eq!(store(&rules, &tier, WRITE).unwrap_err().errno, libc::ELOOP);
    assert!(!place.path.join("elsewhere").exists());
    fs::remove_file(&tier).unwrap();
    assert_eq!(store(&rules, &tier, WRITE).unwrap().0, tier);
    assert_eq!(fs::metadata(&tier).unwrap().permissions().mode() & 0o7777, 0o600);
    fs::write(&tier, "held").unwrap();
    assert!(store(&rules, &tier, WRITE).is_ok());
    assert_eq!(fs::read(&tier).unwrap(), b"held");
    // What a daemon that was taken over would put in its place.
    fs::remove_file(&tier).unwrap();
    symlink(place.path.join("secret"), &tier).unwrap();
    assert_eq!(store(&rules, &tier, WRITE).unwrap_err().errno, libc::ELOOP);
    fs::remove_file(&tier).unwrap();
    fs::hard_link(place.path.join("secret"), &tier).unwrap();
    assert!(store(&rules, &tier, WRITE).unwrap_err().reason.contains("is not a file that prestaged made"));
    symlink(place.path.join("images"), place.path.join("way")).unwrap();
    fs::remove_file(&tier).unwrap();
    let through = Rules { tier: Some(place.path.join("way/tier")), ..place.rules.clone() };
    assert_eq!(store(&through, &place.path.join("way/tier"), WRITE).unwrap_err().errno, libc::ELOOP);
    assert!(!tier.exists());
}

#[test]
fn only_files_and_devices_are_stores() {
    let place = place();
    let pipe = place.path.join("images/pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert_eq!(store(&place.rules, &pipe, READ).unwrap_err().errno, libc::ENOTBLK);
    let everything = Rules { allowed: vec!["/".into()], ..Rules::default() };
    for path in ["/dev/null", "/dev/shm", "/proc/self/fd/0"] {
        assert!(store(&everything, Path::new(path), READ).is_err(), "{path}");
    }
    for path in ["/dev/../etc/passwd", "/dev/fd/../../../../etc/passwd", "/dev/loop-control"] {
        assert!(store(&place.rules, Path::new(path), READ).is_err(), "{path}");
    }
}

/// A loop device for as long as this lives.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Option<Loop> {
        let made = std::process::Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8(made.stdout).ok()?;
        made.status.success().then(|| Loop(name.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn devices_need_a_name_that_is_allowed_and_must_not_be_the_hosts_own() {
    let place = place();
    let Some(device) = Loop::over(&place.path.join("images/disk")) else {
        println!("SKIPPED: no loop device can be made");
        return;
    };
    let name = &device.0;
    let said = store(&Rules::default(), name, READ).unwrap_err();
    assert!(said.reason.contains("store.allowed"), "{said:?}");
    let allowed = Rules { allowed: vec![DEVICES.into()], ..Rules::default() };
    assert_eq!(&store(&allowed, name, WRITE).unwrap().0, name);
    // By another of its names, which is a link: the folder that is allowed is that link's.
    let by_name = Rules { allowed: vec!["/dev/block".into()], ..Rules::default() };
    let found = fs::metadata(name).unwrap().rdev();
    let link = PathBuf::from(format!("/dev/block/{}:{}", major(found), minor(found)));
    match link.exists() {
        true => assert_eq!(&store(&by_name, &link, READ).unwrap().0, name),
        false => println!("SKIPPED in part: this host has no /dev/block"),
    }
    assert!(store(&by_name, name, READ).is_err());
    // As a mounted file system has it.
    let held = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(name).unwrap();
    let said = store(&allowed, name, READ).unwrap_err();
    assert!(said.reason.contains("in use by the host itself"), "{said:?}");
    let named = Rules { named: vec![(name.clone(), false)], ..Rules::default() };
    assert!(store(&named, name, READ).is_ok());
    drop(held);
    assert!(store(&allowed, name, How { exclusive: true, ..WRITE }).is_ok());
}

#[test]
fn a_server_is_connected_to_where_it_is_allowed() {
    let place = place();
    let listen = |at: &Path| std::os::unix::net::UnixListener::bind(at).unwrap();
    let (inside, outside) = (place.path.join("images/s"), place.path.join("s"));
    let _servers = (listen(&inside), listen(&outside));
    assert!(server(&place.rules, &inside).is_ok());
    assert_eq!(server(&place.rules, &outside).unwrap_err().errno, 0);
    assert_eq!(server(&place.rules, &place.path.join("images/disk")).unwrap_err().errno, libc::ECONNREFUSED);
    let named = Rules { servers: vec![outside.clone()], ..Rules::default() };
    assert!(server(&named, &outside).is_ok());
}

#[test]
fn only_files_of_the_configuration_are_read() {
    let place = place();
    let secret = place.path.join("secret");
    assert!(read(&place.rules, &secret).is_err());
    let rules = Rules { readable: vec![secret.clone(), place.path.join("images")], ..Rules::default() };
    assert!(read(&rules, &secret).is_ok());
    assert!(read(&rules, &place.path.join("images")).is_err());
}

#[test]
fn a_group_is_given_what_is_the_daemons_own_alone() {
    let place = place();
    let run = place.path.join("run");
    fs::create_dir(&run).unwrap();
    let make = |name: &str| {
        let path = run.join(name);
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        path
    };
    let give = |path: &Path, group| {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let meant = OpenOptions::new().read(true).custom_flags(flags).open(path).unwrap();
        set_group(&place.rules, &meant.into(), group)
    };
    let group = nix::unistd::getegid().as_raw().max(1);
    let good = make("good");
    let may = nix::unistd::geteuid().is_root();
    assert_eq!(give(&good, group).is_ok(), may, "{:?}", give(&good, group));
    let linked = make("linked");
    fs::hard_link(&linked, run.join("second")).unwrap();
    let program = make("program");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    symlink(place.path.join("secret"), run.join("link")).unwrap();
    for path in [linked, program, run.join("link"), place.path.join("secret")] {
        let said = give(&path, group).unwrap_err();
        assert!(said.reason.contains("not the daemon's"), "{}: {said:?}", path.display());
    }
    assert!(give(&good, 0).is_err());
    let other = Rules { user: place.rules.user + 1, ..place.rules.clone() };
    assert!(set_group(&other, &File::open(&good).unwrap().into(), group).is_err());
}

#[test]
fn every_image_of_a_chain_must_be_allowed_and_only_the_uppermost_is_written_to() {
    let place = place();
    let at = |name: &str| {
        let path = place.path.join(name);
        fs::write(&path, "").unwrap();
        path
    };
    fs::create_dir(place.path.join("base")).unwrap();
    let (top, base, secret) = (at("images/top"), at("base/image"), at("secret"));
    let rules = Rules { backing: vec![place.path.join("base")], ..place.rules.clone() };
    let qcow2 = |path: &Path| Image::Qcow2 { path: path.into(), encryption: None };
    let raw = |path: &Path| Image::Raw { path: path.into() };
    let chain = |images: &[Image], read_only| Chain { disk: "d".into(), images: images.to_vec(), read_only };
    let found = images(&rules, &chain(&[qcow2(&top), raw(&base)], false)).unwrap();
    // What is passed on gives no access by itself.
    for handle in found.into_iter().flatten() {
        assert_eq!(nix::unistd::read(&handle.0, &mut [0]), Err(nix::Error::EBADF));
    }
    assert!(images(&rules, &chain(&[raw(&base)], true)).is_ok());
    assert!(images(&rules, &chain(&[raw(&base)], false)).is_err(), "what others stand on is written to");
    for outside in
        [raw(&secret), qcow2(&secret), raw(&place.path.join("images")), raw(&place.path.join("base/../secret"))]
    {
        assert!(images(&rules, &chain(&[qcow2(&top), outside.clone()], true)).is_err(), "{outside:?}");
    }
    let server = Image::NbdUnix { path: top.as_path().into(), export: String::new() };
    assert!(images(&rules, &chain(&[qcow2(&top), server.clone()], true)).unwrap_err().reason.contains("no socket"));
    // The uppermost's owner is whom the program runs as: without one it would be root.
    for nobodys in [vec![], vec![server], vec![Image::NbdTcp { host: "h".into(), port: 1, export: String::new() }]] {
        assert!(images(&rules, &chain(&nobodys, true)).unwrap_err().reason.contains("begins with an image"));
    }
}
