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
    // The operator's own word is followed, where the daemon cannot have made the link.
    let named = Rules { named: vec![(images.join("last"), false)], ..place.rules.clone() };
    assert_eq!(store(&named, &images.join("last"), READ).unwrap().0, place.path.join("secret"));
    assert!(store(&named, &images.join("last"), WRITE).is_err());
}

/// What a daemon that was taken over would put in the place of what the operator has named in its folders.
#[test]
fn no_link_that_the_daemon_may_have_made_is_followed_whatever_names_it() {
    let place = place();
    let (run, secret) = (place.path.join("run"), place.path.join("secret"));
    fs::create_dir_all(run.join("deep")).unwrap();
    fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
    fs::write(run.join("disk"), [1; 512]).unwrap();
    let at = |name: &str| run.join(name);
    let rules = Rules {
        named: vec![(at("disk"), true), (at("deep/disk"), true), (place.path.join("way"), true)],
        allowed: vec![at("images")],
        backing: vec![at("base")],
        servers: vec![at("server")],
        readable: vec![at("ca"), place.path.join("link")],
        keys: Some(run.clone()),
        ..place.rules.clone()
    };
    // Without links all is as everywhere.
    assert!(store(&rules, &at("disk"), WRITE).is_ok());
    let _server = std::os::unix::net::UnixListener::bind(at("server")).unwrap();
    assert!(server(&rules, &at("server")).is_ok());
    fs::write(at("ca"), "ca").unwrap();
    fs::write(at("d.key"), "key").unwrap();
    fs::set_permissions(at("d.key"), PermissionsExt::from_mode(0o600)).unwrap();
    assert!(read(&rules, &at("ca")).is_ok() && key(&rules, "d").is_ok());
    fs::create_dir(at("images")).unwrap();
    fs::write(at("images/disk"), "").unwrap();
    assert!(store(&rules, &at("images/disk"), WRITE).is_ok());
    // The operator's own links lead on.
    symlink(at("disk"), place.path.join("way")).unwrap();
    symlink(&secret, place.path.join("link")).unwrap();
    assert_eq!(store(&rules, &place.path.join("way"), WRITE).unwrap().0, at("disk"));
    assert_eq!(read(&rules, &place.path.join("link")).unwrap().0, secret);

    let _outside = std::os::unix::net::UnixListener::bind(place.path.join("outside")).unwrap();
    let swap = |name: &str, target: &Path| {
        let _ = fs::remove_file(at(name));
        let _ = fs::remove_dir_all(at(name));
        symlink(target, at(name)).unwrap();
    };
    for (name, target) in [
        ("disk", "secret"),
        ("server", "outside"),
        ("ca", "secret"),
        ("d.key", "secret"),
        ("images", ""),
        ("deep", ""),
        ("base", ""),
    ] {
        swap(name, &place.path.join(target));
    }
    fs::write(place.path.join("disk"), "").unwrap();
    let mut refused: Vec<_> = [at("disk"), at("deep/disk"), at("images/secret"), place.path.join("way")]
        .iter()
        .map(|path| store(&rules, path, WRITE).unwrap_err())
        .collect();
    refused.push(store(&rules, &at("base/secret"), READ).unwrap_err());
    refused.push(server(&rules, &at("server")).unwrap_err());
    refused.push(read(&rules, &at("ca")).unwrap_err());
    refused.push(key(&rules, "d").unwrap_err());
    let chain = |image| Chain { disk: "d".into(), images: vec![image], read_only: true };
    refused.push(images(&rules, &chain(Image::Raw { path: at("disk").as_path().into() })).unwrap_err());
    for said in refused {
        assert!(said.errno == 0 && said.reason.contains("is a link in a folder that prestaged writes to"), "{said:?}");
    }
}

/// A second name of a file of the host's is as good as a link to it.
#[test]
fn a_file_with_another_name_is_not_opened_by_the_one_in_the_daemons_folder() {
    let place = place();
    let run = place.path.join("run");
    fs::create_dir(&run).unwrap();
    let disk = run.join("disk");
    fs::hard_link(place.path.join("secret"), &disk).unwrap();
    let named = Rules { named: vec![(disk.clone(), true)], ..place.rules.clone() };
    let below = Rules { allowed: vec![place.path.clone()], ..place.rules.clone() };
    for rules in [&named, &below] {
        let said = store(rules, &disk, WRITE).unwrap_err();
        assert!(said.reason.contains("has other names"), "{said:?}");
    }
    // Elsewhere names are the operator's, also beside the SSD tier where the daemon is a user of its own, who may write to no more
    // than that file.
    let beside = Rules { tier: Some(place.path.join("tier")), ..below.clone() };
    assert!(store(&beside, &place.path.join("secret"), WRITE).is_err());
    if nix::unistd::geteuid().is_root() {
        let other = Rules { user: 7, ..beside };
        assert!(store(&other, &place.path.join("secret"), WRITE).is_ok());
        std::os::unix::fs::chown(&run, Some(7), None).unwrap();
        assert!(store(&other, &disk, WRITE).is_err());
    }
    assert!(store(&below, &place.path.join("secret"), WRITE).is_ok());
    fs::remove_file(place.path.join("secret")).unwrap();
    assert!(store(&named, &disk, WRITE).is_ok() && store(&below, &disk, WRITE).is_ok());
}

#[test]
fn the_daemons_folders_are_not_where_its_own_links_lead() {
    let place = place();
    for folder in ["run/vm", "etc", "var"] {
        fs::create_dir_all(place.path.join(folder)).unwrap();
    }
    symlink("../run", place.path.join("var/run")).unwrap();
    let own = |folders: &[&str]| {
        let folders: Vec<_> = folders.iter().map(|folder| place.path.join(folder)).collect();
        crate::privilege::own_folders(&place.rules, &folders.iter().map(PathBuf::as_path).collect::<Vec<_>>())
    };
    let run = place.path.join("run");
    assert_eq!(own(&["var/run", "run/vm", "none"]), [run.clone(), run.join("vm")]);
    fs::remove_dir(run.join("vm")).unwrap();
    symlink(place.path.join("etc"), run.join("vm")).unwrap();
    assert_eq!(own(&["var/run", "run/vm"]), std::slice::from_ref(&run));
    assert_eq!(own(&["run/vm", "run"]), std::slice::from_ref(&run));
}

#[test]
fn of_files_that_are_missing_the_ssd_tiers_alone_is_made_and_nothing_in_its_place_is_followed() {
    let place = place();
    let tier = place.path.join("images/tier");
    let rules = Rules { tier: Some(tier.clone()), ..place.rules.clone() };
    assert_eq!(store(&rules, &tier, READ).unwrap_err().errno, libc::ENOENT);
    assert_eq!(store(&rules, &place.path.join("images/other"), WRITE).unwrap_err().errno, libc::ENOENT);
    symlink(place.path.join("elsewhere"), &tier).unwrap();
    let is_refused = |rules: &Rules, path: &Path| {
        let said = store(rules, path, WRITE).unwrap_err();
        assert!(said.errno == 0 && said.reason.contains("is a link in a folder that prestaged writes to"), "{said:?}");
    };
    is_refused(&rules, &tier);
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
    is_refused(&rules, &tier);
    fs::remove_file(&tier).unwrap();
    fs::hard_link(place.path.join("secret"), &tier).unwrap();
    assert!(store(&rules, &tier, WRITE).unwrap_err().reason.contains("is not a file that prestaged made"));
    symlink(place.path.join("images"), place.path.join("way")).unwrap();
    fs::remove_file(&tier).unwrap();
    let through = Rules { tier: Some(place.path.join("way/tier")), ..place.rules.clone() };
    // The operator's own links lead on, and none of the daemon's behind them.
    let (real, _) = store(&through, &place.path.join("way/tier"), WRITE).unwrap();
    assert_eq!(real, tier);
    fs::remove_file(&tier).unwrap();
    symlink(place.path.join("secret"), &tier).unwrap();
    is_refused(&through, &place.path.join("way/tier"));
    fs::remove_file(&tier).unwrap();
    symlink(place.path.join("images"), place.path.join("images/loop")).unwrap();
    let looped = Rules { tier: Some(place.path.join("images/loop/tier")), ..place.rules.clone() };
    is_refused(&looped, &place.path.join("images/loop/tier"));
    assert!(!tier.exists());
}

/// As udev's links are, which name another device when that took the place of the first.
#[test]
fn an_ssd_tiers_device_is_named_by_a_link_that_the_daemon_cannot_have_made() {
    let place = place();
    fs::write(place.path.join("images/other"), [1; 4096]).unwrap();
    let (Some(first), Some(second)) =
        (Loop::over(&place.path.join("images/disk")), Loop::over(&place.path.join("images/other")))
    else {
        println!("SKIPPED: no loop device can be made");
        return;
    };
    let (links, link) = (place.path.join("links"), place.path.join("links/ssd"));
    fs::create_dir(&links).unwrap();
    let rules = Rules { tier: Some(link.clone()), tier_is_device: true, user: 7, ..place.rules.clone() };
    for device in [&first.0, &second.0] {
        let _ = fs::remove_file(&link);
        symlink(device, &link).unwrap();
        assert_eq!(&store(&rules, &link, WRITE).unwrap().0, device);
        let root = Rules { user: nix::unistd::geteuid().as_raw(), ..rules.clone() };
        assert_eq!(&store(&root, &link, WRITE).unwrap().0, device);
        // In a folder that it writes to it may have made the link.
        let written = Rules { tier_is_device: false, ..root };
        assert!(store(&written, &link, WRITE).unwrap_err().reason.contains("is a link in a folder"));
    }
    std::os::unix::fs::chown(&links, Some(7), None).unwrap();
    assert!(store(&rules, &link, WRITE).unwrap_err().reason.contains("is a link in a folder"));
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
    // Whatever is made in it would be that group's.
    let folder = run.join("folder");
    fs::create_dir(&folder).unwrap();
    assert_eq!(give(&folder, group).is_ok(), may);
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o2775)).unwrap();
    for path in [linked, program, folder, run.join("link"), place.path.join("secret")] {
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
