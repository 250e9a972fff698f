//! Templates: what goes over the wire, and what the daemon does about them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Reply;
use super::types::Health;

/// A machine to save as a template.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateSave {
    /// A name, of a folder below `<state_dir>/templates`, or an absolute path. Default: the machine's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

/// A machine was saved as a template, and goes on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct TemplateSaved {
    pub vm: String,
    /// Folder of the template.
    pub template: String,
    pub memory_bytes: u64,
    /// Of the memory, what is not zero.
    pub used_bytes: u64,
    /// How long the machine's processors stood still.
    pub stood_ms: u64,
}

/// A template that there is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// By which it is named in requests: of a folder below `<state_dir>/templates`, or an absolute path.
    pub name: String,
    /// Its folder.
    pub path: String,
    pub health: Health,
    /// Why it cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Machine that it was made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_unix_ms: Option<u64>,
    pub memory_bytes: u64,
    /// What clones need first; before one has run: what is not zero.
    pub needed_bytes: u64,
    /// A clone has taught what clones need first.
    pub learned: bool,
    /// Clones of it that run; absent where libvirt cannot say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clones: Option<Vec<String>>,
}

/// All templates, by folder and name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct TemplateList {
    pub templates: Vec<Template>,
}

/// A clone to start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneStart {
    /// A name, of a folder below `<state_dir>/templates`, or an absolute path.
    pub template: String,
    /// Name of the machine.
    pub name: String,
    /// Check the memory's contents first, which reads all of it.
    #[serde(default)]
    pub verify: bool,
}

/// A clone runs. What it needs first was read ahead of it; the rest is read behind it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct CloneStarted {
    pub vm: String,
    pub uuid: String,
    pub template: String,
    /// From the order until QEMU stood there paused, had loaded its devices, and ran.
    pub created_ms: u64,
    pub loaded_ms: u64,
    pub resumed_ms: u64,
    pub progress: CloneProgress,
    /// What should be known.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// What is being read for a clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClonePhase {
    /// What it needs first.
    #[default]
    Ahead,
    /// The same, while its first touches are recorded for clones to come.
    Learning,
    /// The rest.
    Behind,
    /// Nothing any more: all is read, or the notes say why not.
    Done,
}

/// How far reading a clone's memory is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct CloneProgress {
    /// Folder of the template.
    pub template: String,
    pub phase: ClonePhase,
    /// What it needs first: asked for so far, and in all. Devices included.
    pub needed_done_bytes: u64,
    pub needed_bytes: u64,
    /// What is not zero besides: read so far, and in all.
    pub rest_done_bytes: u64,
    pub rest_bytes: u64,
    /// Parts of the rest, of 1 MiB, that could not be read.
    #[serde(default)]
    pub read_errors: u64,
    /// What was not done for it, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Templates, as the API sees the daemon.
pub trait TemplateControl {
    /// Saves a running machine as a template; it stands still meanwhile and goes on whatever happens.
    /// Errors: `NotFound`, `AlreadyExists`, `InUse` (being saved), `NotPossible` (with what to change), `NoSpace`,
    /// `HypervisorUnavailable`.
    fn template_save(&self, vm: String, request: TemplateSave) -> Reply<'_, TemplateSaved>;
    /// Errors: `Unavailable`.
    fn templates(&self) -> Reply<'_, TemplateList>;
    /// Removes a template that no machine runs on. Errors: `NotFound`, `InvalidRequest`, `InUse`, `NotPossible` (no template, or with
    /// files of others), `HypervisorUnavailable` (nobody knows who runs on it).
    fn template_remove(&self, template: String) -> Reply<'_, ()>;
    /// Starts a clone of a template. Errors: `NotFound`, `InvalidRequest`, `NotPossible` (damaged, or what QEMU says),
    /// `HypervisorUnavailable`.
    fn clone_start(&self, request: CloneStart) -> Reply<'_, CloneStarted>;
}
