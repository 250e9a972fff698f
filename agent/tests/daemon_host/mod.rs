//! A folder with a `prestaged` of its own, and what `prestagectl` says to it.
#![allow(dead_code, reason = "no test program asks for all of it")]

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub(crate) struct Host {
    folder: tempfile::TempDir,
    pub(crate) daemon: Option<Child>,
    /// Further settings of the command line.
    pub(crate) also: Vec<String>,
    /// The command line allows stores in this folder.
    pub(crate) set_allowed: bool,
    /// Further variables of its environment.
    pub(crate) environment: Vec<(String, String)>,
}

impl Host {
    pub(crate) fn new() -> Host {
        // Socket paths are short; the target folder's may not be.
        Host {
            folder: tempfile::tempdir().unwrap(),
            daemon: None,
            also: Vec::new(),
            set_allowed: true,
            environment: Vec::new(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn config(&self, extra: &str) -> PathBuf {
        let file = self.path("prestaged.toml");
        let (state, run) = (self.path("state"), self.path("run"));
        let text = format!(
            "[daemon]\nstate_dir = \"{}\"\nrun_dir = \"{}\"\n[libvirt]\nenabled = false\n[cache]\nram_size = \"16MiB\"\n{extra}",
            state.display(),
            run.display()
        );
        std::fs::write(&file, text).unwrap();
        file
    }

    pub(crate) fn start(&mut self, extra: &str) {
        let config = self.config(extra);
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_prestaged"));
        command.arg("--config").arg(config);
        if self.set_allowed {
            command.arg("--set").arg(self.allowed());
        }
        // A host that has a package's user runs the same tests.
        command.args(["--set", "daemon.user=\"nobody-of-this-name\""]);
        for also in &self.also {
            command.arg("--set").arg(also);
        }
        command.envs(self.environment.iter().cloned());
        self.daemon = Some(command.stderr(log).spawn().unwrap());
        let deadline = Instant::now() + Duration::from_secs(60);
        // The API answers before the disks of the last run are open.
        let ready = || {
            let list = self.ctl(&["disk", "list"]);
            list.status.code() == Some(0) && !String::from_utf8_lossy(&list.stdout).contains("being opened")
        };
        while !ready() {
            assert!(Instant::now() < deadline, "prestaged does not start:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Stores are in this folder.
    pub(crate) fn allowed(&self) -> String {
        format!("store.allowed=[\"{}\"]", self.folder.path().display())
    }

    pub(crate) fn stop(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(daemon.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(daemon.wait().unwrap().success(), "{}", self.log());
        assert!(!self.log().contains("panicked"), "{}", self.log());
    }

    /// As a crash of the daemon.
    pub(crate) fn kill(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// Has the daemon read its configuration anew, and waits until it says that it is through with that.
    pub(crate) fn reload(&self) -> String {
        let before = self.log().len();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.daemon.as_ref().unwrap().id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let said = self.log()[before..].to_owned();
            if ["configuration reloaded", "configuration not reloaded"].iter().any(|end| said.contains(end)) {
                return said;
            }
            assert!(Instant::now() < deadline, "no reload:\n{said}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub(crate) fn ctl(&self, words: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_prestagectl"));
        command.arg("--socket").arg(self.path("run/prestaged.sock")).args(words);
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// The command fails with this code and says each of these.
    pub(crate) fn refuses(&self, words: &[&str], code: i32, says: &[&str]) {
        let output = self.ctl(words);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {text}");
        for part in says {
            assert!(text.contains(part), "{words:?} should say {part:?}, says {text}");
        }
    }

    pub(crate) fn does(&self, words: &[&str]) -> String {
        let output = self.ctl(words);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub(crate) fn store(&self, name: &str, bytes: u64) -> String {
        let path = self.path(name);
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        path.display().to_string()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        // What a daemon of ours asks the kernel for is allowed to it.
        if !std::thread::panicking() {
            let log = self.log();
            let refused: Vec<_> = log.lines().filter(|line| line.contains("is refused by the sandbox")).collect();
            assert!(refused.is_empty(), "{refused:?}");
        }
    }
}
