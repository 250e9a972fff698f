//! Templates: machines saved, clones started, their memory read ahead of them and behind them.

use super::Shared;
use super::control::{Handle, blocking};
use super::machines::{api_error, hypervisor};
use crate::learner::run::unix_ms;
use parking_lot::Mutex;
use prestage_integration::api::templates::{
    self as types, ClonePhase, CloneProgress, CloneStart, CloneStarted, TemplateControl, TemplateList, TemplateSave,
    TemplateSaved,
};
use prestage_integration::api::types::{Health, validate_name};
use prestage_integration::api::{ApiError, ErrorCode, Reply};
use prestage_integration::libvirt::template::{Ready, clone_definition};
use prestage_integration::libvirt::{Hypervisor, HypervisorError, Uuid, Vm};
use prestage_integration::memory::template::preload::{Ended, Progress};
use prestage_integration::memory::template::record::{self, Recording, Starter};
use prestage_integration::memory::template::{
    self, Draft, Learned, Origin, PAGE_BYTES, Template, TemplateError, drafts,
};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Longest time for a machine's state to be written or read: a large machine on a slow disk.
const STATE_LIMIT: Duration = Duration::from_secs(600);
/// Longest time that a clone's touches are recorded. Most have answered by then; what comes later is read behind it.
const RECORD_LIMIT: Duration = Duration::from_secs(30);
/// A device with less room than this is full: what did not fit was larger.
const FULL_BYTES: u64 = 4 << 20;
/// What to do about a full device.
const FULL: &str = "free some space there, or save to another folder with --to";

/// What is going on with templates.
#[derive(Debug, Default)]
pub(super) struct Templates {
    /// Names of machines that are being saved or started.
    busy: Mutex<HashSet<String>>,
    clones: Mutex<HashMap<Uuid, Arc<Reading>>>,
}

/// What is read for one clone.
#[derive(Debug)]
struct Reading {
    template: PathBuf,
    progress: Progress,
    learning: AtomicBool,
    behind: AtomicBool,
    /// What stands against reading.
    notes: Mutex<Vec<String>>,
}

impl Reading {
    fn report(&self) -> CloneProgress {
        let far = self.progress.look();
        let is = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        let phase = if far.ended.is_some() {
            ClonePhase::Done
        } else if is(&self.behind) {
            ClonePhase::Behind
        } else if is(&self.learning) {
            ClonePhase::Learning
        } else {
            ClonePhase::Ahead
        };
        let mut notes = self.notes.lock().clone();
        notes.extend(far.ended.and_then(in_words).map(str::to_owned));
        CloneProgress {
            template: self.template.display().to_string(),
            phase,
            needed_done_bytes: far.needed,
            needed_bytes: far.needed_bytes,
            rest_done_bytes: far.rest,
            rest_bytes: far.rest_bytes,
            read_errors: far.read_errors,
            notes,
        }
    }

    /// Reading ahead is help; the clone runs without it.
    fn said(&self, what: &str, result: Result<(), impl std::fmt::Display>) {
        if let Err(error) = result {
            tracing::warn!(template = %self.template.display(), %error, "{what}");
            self.notes.lock().push(format!("{what}: {error}"));
        }
    }
}

/// Why not all is read.
fn in_words(ended: Ended) -> Option<&'static str> {
    match ended {
        Ended::Whole => None,
        Ended::Stopped => Some("reading was stopped"),
        Ended::NoRoom => Some("the host has less than a tenth of its memory free: the rest is not read ahead"),
        Ended::Unreadable => Some("the template's memory can't be read: its store is broken, or the file was changed"),
    }
}

/// A machine's turn; given back when dropped.
struct Turn(Shared, String);

impl Templates {
    /// How far reading for a machine is, if it is a clone. Of one that an earlier run of the daemon has started, which read for it, nobody
    /// knows more than that.
    pub(super) fn progress(&self, vm: &Vm) -> Option<CloneProgress> {
        if let Some(reading) = self.clones.lock().get(&vm.id.uuid) {
            return Some(reading.report());
        }
        let template = vm.clone_of.as_ref()?.display().to_string();
        let note = "prestaged was restarted since it was started: how much was read for it is not known".to_owned();
        Some(CloneProgress { template, phase: ClonePhase::Done, notes: vec![note], ..CloneProgress::default() })
    }

    /// Clones whose template could not be read in part, with how often.
    pub(super) fn troubles(&self) -> Vec<(PathBuf, u64)> {
        let clones = self.clones.lock();
        let errors = clones.values().map(|reading| (reading.template.clone(), reading.progress.look().read_errors));
        let mut troubles: Vec<_> = errors.filter(|(_, errors)| *errors > 0).collect();
        troubles.sort();
        troubles.dedup_by(|a, b| a.0 == b.0);
        troubles
    }

    /// The machine has ended: nothing is to be read for it any more.
    pub(super) fn ended(&self, vm: Uuid) {
        if let Some(reading) = self.clones.lock().remove(&vm) {
            reading.progress.stop();
        }
    }

    /// Stops reading for all clones but these, which run.
    pub(super) fn keep(&self, running: &HashSet<Uuid>) {
        self.clones.lock().retain(|vm, reading| {
            let runs = running.contains(vm);
            if !runs {
                reading.progress.stop();
            }
            runs
        });
    }
}

impl Turn {
    fn take(daemon: &Shared, vm: &str) -> Result<Self, ApiError> {
        if !daemon.templates.busy.lock().insert(vm.to_owned()) {
            let detail = format!("machine {vm} is being saved or started already; wait for its end");
            return Err(ApiError::new(ErrorCode::InUse, detail));
        }
        Ok(Self(daemon.clone(), vm.to_owned()))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.templates.busy.lock().remove(&self.1);
    }
}

/// Has what a crash left half done end. Called whenever libvirt is there again.
pub(super) async fn recover(daemon: &Shared, hypervisor: &Hypervisor) {
    let busy = daemon.templates.busy.lock().iter().cloned().collect();
    match hypervisor.recover_templates(busy).await {
        Ok(done) => done.iter().for_each(|line| tracing::warn!("{line}")),
        Err(error) => tracing::warn!(%error, "not looked for unfinished templates"),
    }
}

/// libvirt may have gone away under the work, and be there again by now.
async fn after_failure(daemon: &Shared, hypervisor: &Hypervisor, turn: Turn, error: &HypervisorError) -> ApiError {
    drop(turn);
    recover(daemon, hypervisor).await;
    api_error(error)
}

fn template_error(error: &TemplateError) -> ApiError {
    let full = matches!(error, TemplateError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull);
    if full {
        return ApiError::new(ErrorCode::NoSpace, format!("{error}; {FULL}"));
    }
    let code = match error {
        TemplateError::Missing { .. } => ErrorCode::NotFound,
        TemplateError::Exists { .. } => ErrorCode::AlreadyExists,
        TemplateError::Busy { .. } => ErrorCode::InUse,
        TemplateError::Io { .. } => ErrorCode::Unavailable,
        _ => ErrorCode::NotPossible,
    };
    ApiError::new(code, error.to_string())
}

/// The folder that a name or an absolute path means.
fn folder(daemon: &Shared, template: &str) -> Result<PathBuf, ApiError> {
    // An absolute path stays what it is.
    let path = checked(template).map(|template| usual(daemon).join(template))?;
    if daemon.sandbox.may_write(&path) { Ok(path) } else { Err(outside(&path)) }
}

fn outside(path: &Path) -> ApiError {
    let detail = format!(
        "prestaged may not use templates in the folder of {}; add it to `daemon.template_dirs` and restart prestaged",
        path.display()
    );
    ApiError::new(ErrorCode::NotPossible, detail)
}

/// The folder by the one name that it has without links on the way; the last part is not followed. As it is, where that is not to be found
/// out.
fn real(path: &Path) -> PathBuf {
    let plain: PathBuf = path.components().collect();
    let real =
        plain.parent().zip(plain.file_name()).and_then(|(parent, name)| Some(parent.canonicalize().ok()?.join(name)));
    real.unwrap_or(plain)
}

/// A name, or an absolute path, that a template may have.
fn checked(template: &str) -> Result<&Path, ApiError> {
    let shown = template.escape_debug();
    if template.chars().any(char::is_control) {
        return Err(ApiError::invalid(format!("`{shown}` has control characters")));
    }
    let path = Path::new(template);
    if !template.starts_with('/') {
        let why = "is neither an absolute path nor a name of 1 to 64 letters, digits, `.`, `_` or `-`";
        return validate_name(template).map(|()| path).map_err(|_| ApiError::invalid(format!("`{shown}` {why}")));
    }
    if path.components().any(|part| part == std::path::Component::ParentDir) {
        return Err(ApiError::invalid(format!("`{shown}` has `..`; name the folder without")));
    }
    // Drafts have such names, and are removed after a crash.
    if path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b".")) {
        return Err(ApiError::invalid(format!("the name of the folder `{shown}` must not begin with a dot")));
    }
    Ok(path)
}

/// The folder that templates are in which are named without a folder.
fn usual(daemon: &Shared) -> PathBuf {
    daemon.config.lock().daemon.state_dir.join("templates")
}

/// Removes what a crash has left of drafts. To be called before any is begun.
pub(super) fn clear(daemon: &Shared) {
    for folder in drafts::clear(&usual(daemon)) {
        tracing::warn!(folder = %folder.display(), "a template that was not finished has been removed; save it anew");
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl TemplateControl for Handle {
    fn template_save(&self, vm: String, request: TemplateSave) -> Reply<'_, TemplateSaved> {
        Box::pin(async move { save(&self.0, &vm, request).await })
    }

    fn templates(&self) -> Reply<'_, TemplateList> {
        Box::pin(async move { list(&self.0).await })
    }

    fn template_remove(&self, template: String) -> Reply<'_, ()> {
        Box::pin(async move { remove(&self.0, &template).await })
    }

    fn clone_start(&self, request: CloneStart) -> Reply<'_, CloneStarted> {
        Box::pin(async move { start(&self.0, request).await })
    }
}

/// Clones that run, by name, with their templates' folders.
async fn clones(daemon: &Shared) -> Result<Vec<(String, PathBuf)>, ApiError> {
    let vms = hypervisor(daemon)?.list().await.map_err(|error| api_error(&error))?;
    let clones = vms.into_iter().filter(Vm::is_running);
    Ok(clones.filter_map(|vm| Some((vm.id.name, vm.clone_of?))).collect())
}

async fn list(daemon: &Shared) -> Result<TemplateList, ApiError> {
    let clones = clones(daemon).await.ok();
    let usual = usual(daemon);
    let elsewhere = daemon.config.lock().daemon.template_dirs.clone();
    let shared = usual.clone();
    let found = blocking(move || {
        let folders = [shared].into_iter().chain(elsewhere);
        folders.map(|folder| template::list(&folder)).collect::<Result<Vec<_>, _>>()
    });
    let found = found.await?.map_err(|error| template_error(&error))?;
    let described = found.into_iter().flatten().map(|(path, opened)| {
        let name = path.strip_prefix(&usual).unwrap_or(&path).display().to_string();
        let of_it = |clones: &Vec<(String, PathBuf)>| {
            clones.iter().filter(|(_, of)| *of == path).map(|(name, _)| name.clone()).collect()
        };
        let known = types::Template {
            name,
            path: path.display().to_string(),
            clones: clones.as_ref().map(of_it),
            ..Default::default()
        };
        match opened {
            Ok(template) => types::Template {
                detail: template.set_trouble,
                machine: Some(template.manifest.origin.name),
                created_unix_ms: Some(template.manifest.created_unix_ms),
                memory_bytes: template.manifest.memory_bytes,
                needed_bytes: template.working_set.pages() * PAGE_BYTES,
                learned: template.working_set.learned == Learned::FirstTouch,
                ..known
            },
            Err(error) => types::Template { health: Health::Degraded, detail: Some(error.to_string()), ..known },
        }
    });
    Ok(TemplateList { templates: described.collect() })
}

async fn remove(daemon: &Shared, template: &str) -> Result<(), ApiError> {
    let asked = folder(daemon, template)?;
    let found = clones(daemon).await?;
    let (path, on_it) = blocking(move || {
        // By whatever name it was asked for, or given to a clone.
        let path = real(&asked);
        let of_it = found.into_iter().filter(|(_, of)| real(of) == path);
        let names: Vec<_> = of_it.map(|(name, _)| name).collect();
        (path, names)
    })
    .await?;
    // Where the links on the way lead to.
    if !daemon.sandbox.may_write(&path) {
        return Err(outside(&path));
    }
    if !on_it.is_empty() {
        let detail = format!("template {} has clones that run: {}; stop them first", path.display(), on_it.join(", "));
        return Err(ApiError::new(ErrorCode::InUse, detail));
    }
    let removed = path.clone();
    blocking(move || template::remove(&path)).await?.map_err(|error| template_error(&error))?;
    tracing::info!(template = %removed.display(), "template removed");
    Ok(())
}

async fn save(daemon: &Shared, vm: &str, request: TemplateSave) -> Result<TemplateSaved, ApiError> {
    let hypervisor = hypervisor(daemon)?;
    let machine = hypervisor.savable(vm).await.map_err(|error| api_error(&error))?;
    let target = folder(daemon, &request.to.unwrap_or_else(|| machine.vm.file_name()))?;
    let turn = Turn::take(daemon, &machine.vm.name)?;
    let (group, register) = (machine.group, usual(daemon));
    let begun = blocking(move || {
        let draft = Draft::begin(&target, group, &register)?;
        draft.create_state().map(|state| (draft, state))
    });
    let (draft, state) = begun.await?.map_err(|error| template_error(&error))?;
    let saved = match hypervisor.save_state(machine.vm.uuid, state, STATE_LIMIT).await {
        Ok(saved) => saved,
        Err(error) => {
            // as long as it takes the room: QEMU's reason is a text, and not the same in all versions
            let full = draft.room().is_ok_and(|bytes| bytes < FULL_BYTES);
            let said = after_failure(daemon, &hypervisor, turn, &error).await;
            if !full {
                return Err(said);
            }
            let to = draft.target().display();
            let detail = format!("{error}. The device of {to} is full: {FULL}");
            return Err(ApiError::new(ErrorCode::NoSpace, detail));
        }
    };
    let origin = Origin {
        name: saved.vm.name.clone(),
        uuid: saved.vm.uuid.to_string(),
        machine_type: saved.machine_type,
        qemu_version: saved.qemu_version,
    };
    let finish = move || draft.finish(&saved.memory, &saved.definition, origin, unix_ms());
    let template = blocking(finish).await?.map_err(|error| template_error(&error))?;
    tracing::info!(vm = saved.vm.name, template = %template.path().display(), stood = ?saved.stood, "saved as a template");
    Ok(TemplateSaved {
        vm: saved.vm.name,
        template: template.path().display().to_string(),
        memory_bytes: template.manifest.memory_bytes,
        used_bytes: template.working_set.pages() * PAGE_BYTES,
        stood_ms: millis(saved.stood),
    })
}

async fn start(daemon: &Shared, request: CloneStart) -> Result<CloneStarted, ApiError> {
    let hypervisor = hypervisor(daemon)?;
    let path = folder(daemon, &request.template)?;
    let turn = Turn::take(daemon, &request.name)?;
    if hypervisor.get(&request.name).await.is_ok() {
        let detail = format!("there is a machine {} already; give another name", request.name.escape_debug());
        return Err(ApiError::new(ErrorCode::AlreadyExists, detail));
    }
    let (name, verify) = (request.name.clone(), request.verify);
    let (template, definition, state) = blocking(move || {
        let template = Template::open(&path).map_err(|error| template_error(&error))?;
        if verify {
            template.verify().map_err(|error| template_error(&error))?;
        }
        let definition = clone_definition(&template, &name).map_err(|error| {
            ApiError::new(ErrorCode::NotPossible, format!("template {}: {error}", template.path().display()))
        })?;
        let state = template.open_state().map_err(|error| template_error(&error))?;
        Ok::<_, ApiError>((template, definition, state))
    })
    .await??;
    let reading = Arc::new(Reading {
        template: template.path().to_owned(),
        progress: Progress::default(),
        learning: AtomicBool::new(template.working_set.learned == Learned::Residency),
        behind: AtomicBool::new(false),
        notes: Mutex::default(),
    });
    if let Some(trouble) = &template.set_trouble {
        tracing::warn!(template = %template.path().display(), trouble, "the set of pages to read first is not used");
        reading
            .notes
            .lock()
            .push(format!("nothing is read ahead of it, but what it touches is recorded anew: {trouble}"));
    }
    let (starter, recording) = record(daemon, &reading);
    // What the clone needs is on its way while libvirt and QEMU get ready.
    let ahead = spawn_ahead(&template, &reading);
    let memory = template.manifest.memory_id.clone();
    let ready = move |ready: &Ready<'_>| {
        if let Some(starter) = starter {
            starter.watch(ready.place(&memory));
        }
    };
    let cloned = match hypervisor.start_clone(definition, state, STATE_LIMIT, ready).await {
        Ok(cloned) => cloned,
        Err(error) => {
            reading.progress.stop();
            return Err(after_failure(daemon, &hypervisor, turn, &error).await);
        }
    };
    daemon.templates.clones.lock().insert(cloned.vm.uuid, reading.clone());
    let mut notes = Vec::new();
    if cloned.unplugged > 0 {
        notes.push(format!(
            "its guest has the MAC and IP addresses of the machine it was: {} network interface(s) are unplugged. Give the \
             guest addresses of its own, then plug them in with `virsh domif-setlink {} INTERFACE up`",
            cloned.unplugged, cloned.vm.name
        ));
    }
    if reading.learning.load(Ordering::Relaxed) {
        notes.push("what it touches first is recorded for the template's clones to come".to_owned());
    }
    let origin = template.path().display().to_string();
    spawn_behind(template, recording, reading.clone(), ahead);
    tracing::info!(vm = cloned.vm.name, template = origin, resumed = ?cloned.resumed, "clone started");
    Ok(CloneStarted {
        vm: cloned.vm.name,
        uuid: cloned.vm.uuid.to_string(),
        template: origin,
        created_ms: millis(cloned.created),
        loaded_ms: millis(cloned.loaded),
        resumed_ms: millis(cloned.resumed),
        progress: reading.report(),
        notes,
    })
}

type Ahead = std::io::Result<std::thread::JoinHandle<()>>;

/// Reads what a clone needs first, on a thread of its own: a slow store lets its caller wait.
fn spawn_ahead(template: &Template, reading: &Arc<Reading>) -> Ahead {
    let (template, reading) = (template.clone(), reading.clone());
    std::thread::Builder::new().name("template".into()).spawn(move || {
        reading.said("not read ahead", template.read_ahead(&reading.progress));
    })
}

/// Has a recorder get ready, if the clone is to teach what clones touch first.
fn record(daemon: &Shared, reading: &Arc<Reading>) -> (Option<Starter>, Option<Recording>) {
    if !reading.learning.load(Ordering::Relaxed) {
        return (None, None);
    }
    let (helper, stopped) = (super::run::helper(&daemon.config.lock()), Arc::clone(reading));
    match record::start(helper, Vec::new(), RECORD_LIMIT, move || stopped.progress.is_stopped()) {
        Ok((starter, recording)) => (Some(starter), Some(recording)),
        Err(error) => {
            reading.said(NOT_RECORDED, Err(error));
            reading.learning.store(false, Ordering::Relaxed);
            (None, None)
        }
    }
}

const NOT_RECORDED: &str = "what it touches first is not recorded";

/// Waits for the recording of a first clone's touches, then reads the rest, on a thread of its own and of idle priority.
fn spawn_behind(mut template: Template, recording: Option<Recording>, reading: Arc<Reading>, ahead: Ahead) {
    let unstarted = reading.clone();
    let work = move || {
        let asked = template.needed();
        if let Some(recording) = recording {
            reading.said(NOT_RECORDED, learn(&mut template, recording, &reading));
            reading.learning.store(false, Ordering::Relaxed);
        }
        match ahead {
            Ok(ahead) => drop(ahead.join()), // it has said what it had to say
            Err(error) => reading.said("not read ahead", Err(error)),
        }
        reading.behind.store(true, Ordering::Relaxed);
        for (what, error) in crate::models::priority::become_idle() {
            tracing::debug!(what, %error, "the rest of a template is read at a higher priority");
        }
        reading.said("the rest is not read", template.read_behind(&asked, &reading.progress));
    };
    if let Err(error) = std::thread::Builder::new().name("template".into()).spawn(work) {
        unstarted.said("the rest is not read", Err(error));
        unstarted.progress.end(Ended::Unreadable);
    }
}

fn learn(template: &mut Template, recording: Recording, reading: &Reading) -> Result<(), String> {
    let recorded = recording.finish().map_err(|error| error.to_string())?;
    let (pages, heard, lost) = (recorded.set.pages(), recorded.heard_pages, recorded.lost);
    // A clone that was ended at once teaches that nothing is needed.
    if pages == 0 || reading.progress.is_stopped() {
        return Ok(());
    }
    let path = template.path().display().to_string();
    tracing::info!(template = path, pages, heard, lost, signal = %recorded.signal, "first touches recorded");
    template.learn(recorded.set).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_has_a_plain_name_or_a_path_that_is_no_drafts() {
        for good in ["web", "web-2.old", "/srv/t/web"] {
            assert_eq!(checked(good).unwrap(), Path::new(good));
        }
        for odd in ["", "../web", "a/b", ".web.draft", "/", "/srv/.web.draft", "/srv/..", "/srv/a\nINFO forged", "a\0b"]
        {
            assert!(checked(odd).is_err(), "{odd:?}");
        }
    }
}
