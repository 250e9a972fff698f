//! `vm save-template`, `vm start-from-template`, `template list` and `template remove`.

use super::table::{Align, Fields, Table, printable};
use super::{Failure, answer, render};
use crate::client::{Client, encode};
use crate::config::units::human_sizes;
use clap::{Args, Subcommand};
use prestage_integration::api::templates::{
    ClonePhase, CloneProgress, CloneStart, CloneStarted, TemplateList, TemplateSave, TemplateSaved,
};
use prestage_integration::api::types::{Vm, validate_name};
use serde_json::json;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// Between two looks of `--wait`.
const LOOK: Duration = Duration::from_millis(250);

#[derive(Debug, Args)]
pub struct SaveArgs {
    /// Name or UUID
    vm: String,
    /// Name, or folder to make, such as ./web or /srv/templates/web [default: the machine's name]
    #[arg(long, value_name = "NAME|DIR")]
    to: Option<String>,
}

#[derive(Debug, Args)]
pub struct StartArgs {
    /// Name, or its folder, such as ./web or /srv/templates/web
    template: String,
    /// Name of the machine to make
    #[arg(long, value_parser = clone_name)]
    name: String,
    /// Check the memory's contents first, which reads all of it
    #[arg(long)]
    verify: bool,
    /// Return when nothing is read for it any more
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// All templates, and the clones that run
    #[command(long_about = "All templates, and the clones that run.\n\n  MEMORY  of a clone\n  \
        FIRST   of it, what clones need first; before one has taught that: all that is not zero\n  \
        CLONES  that run now; - of none, ? where libvirt does not say\n  \
        STATE   why it cannot be used, if so\n\nThose in <state_dir>/templates are named, those in the folders of daemon.template_dirs by their paths.")]
    List,
    /// Remove a template that no machine runs on
    Remove {
        /// Name, or its folder, such as ./web or /srv/templates/web
        template: String,
    },
}

pub(super) async fn run(
    command: TemplateCommand,
    client: &Client,
    json: bool,
    out: &mut impl Write,
) -> Result<(), Failure> {
    match command {
        TemplateCommand::List => answer(out, json, &client.get::<TemplateList>("/v1/templates").await?, |list| {
            templates(list, render::now_unix_ms())
        }),
        TemplateCommand::Remove { template } => {
            let template = place(&template)?;
            client.delete(&format!("/v1/templates/{}", encode(&template))).await?;
            answer(out, json, &json!({ "removed": template }), |_| {
                format!("template {} is removed\n", printable(&template))
            })
        }
    }
}

fn templates(list: &TemplateList, now_unix_ms: u64) -> String {
    if list.templates.is_empty() {
        return "no templates; `prestagectl vm save-template VM` saves one\n".to_owned();
    }
    let mut table = Table::new(&[
        ("TEMPLATE", Align::Left),
        ("OF", Align::Left),
        ("SAVED", Align::Left),
        ("MEMORY", Align::Right),
        ("FIRST", Align::Right),
        ("CLONES", Align::Left),
        ("STATE", Align::Left),
    ]);
    for template in &list.templates {
        let [memory, first] = human_sizes([template.memory_bytes, template.needed_bytes]);
        let clones = match &template.clones {
            None => "?".to_owned(),
            Some(none) if none.is_empty() => "-".to_owned(),
            Some(clones) => clones.join(", "),
        };
        table.row([
            template.name.clone(),
            render::dash(template.machine.as_deref()),
            template.created_unix_ms.map_or_else(|| "-".to_owned(), |at| render::ago(at, now_unix_ms)),
            memory,
            first,
            clones,
            render::with_detail(template.health, template.detail.as_deref()),
        ]);
    }
    table.render()
}

fn clone_name(text: &str) -> Result<String, String> {
    validate_name(text).map(|()| text.to_owned()).map_err(|reason| reason.replace("disk name", "name for a machine"))
}

/// A name goes as it is; a path is below the operator's folder and not the daemon's.
fn place(text: &str) -> Result<String, Failure> {
    if text.contains('/') { super::absolute(Path::new(text)) } else { Ok(text.to_owned()) }
}

pub(super) async fn save(args: SaveArgs, client: &Client, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let request = TemplateSave { to: args.to.as_deref().map(place).transpose()? };
    let reply: TemplateSaved = client.post(&format!("/v1/vms/{}/template", encode(&args.vm)), &request).await?;
    answer(out, json, &reply, |saved| {
        let (vm, template) = (printable(&saved.vm), printable(&saved.template));
        let (used, memory) = (saved.used_bytes >> 20, saved.memory_bytes >> 20);
        format!("{vm} is saved in {template}: {used} of {memory} MiB in use; it stood for {} ms\n", saved.stood_ms)
    })
}

pub(super) async fn start(args: StartArgs, client: &Client, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let request = CloneStart { template: place(&args.template)?, name: args.name, verify: args.verify };
    let mut started: CloneStarted = client.post("/v1/clones", &request).await?;
    while args.wait && started.progress.phase != ClonePhase::Done {
        tokio::time::sleep(LOOK).await;
        // gone: so is what was read for it
        let Ok(vm) = client.get::<Vm>(&format!("/v1/vms/{}", encode(&started.uuid))).await else { break };
        match vm.clone {
            Some(progress) => started.progress = progress,
            None => break,
        }
    }
    answer(out, json, &started, |started| {
        let (vm, template) = (printable(&started.vm), printable(&started.template));
        let mut text = format!("{vm} runs, a clone of {template}, after {} ms\n", started.resumed_ms);
        text += &format!("{}\n", progress(&started.progress));
        text += &render::notes(&started.progress.notes);
        text += &render::notes(&started.notes);
        text
    })
}

/// What is read for a clone, in one line.
fn progress(of: &CloneProgress) -> String {
    format!("streamed {}; {}", streamed(of), phase(of.phase))
}

/// How much of a clone's memory is read.
fn streamed(of: &CloneProgress) -> String {
    let mib = |bytes: u64| bytes >> 20;
    let (done, all) = (of.needed_done_bytes + of.rest_done_bytes, of.needed_bytes + of.rest_bytes);
    if all == 0 && of.phase == ClonePhase::Done {
        return "not known".to_owned();
    }
    let mut text = format!(
        "{} of {} MiB, {} of {} needed first",
        mib(done),
        mib(all),
        mib(of.needed_done_bytes),
        mib(of.needed_bytes)
    );
    if of.read_errors > 0 {
        text += &format!(", {} read errors", of.read_errors);
    }
    text
}

fn phase(of: ClonePhase) -> &'static str {
    match of {
        ClonePhase::Ahead => "what it needs first is being read",
        ClonePhase::Learning => "its first touches are being recorded",
        ClonePhase::Behind => "the rest is being read",
        ClonePhase::Done => "done",
    }
}

/// The fields of a clone in `vm show`.
pub(super) fn fields(of: &CloneProgress) -> String {
    let mut fields = Fields::default();
    fields.add("clone of", &of.template).add("streamed", streamed(of)).add("reading", phase(of.phase));
    for note in &of.notes {
        fields.add("note", note);
    }
    fields.render()
}

/// A clone's cell in `vm list`.
pub(super) fn cell(of: &CloneProgress) -> String {
    let (done, all) = (of.needed_done_bytes + of.rest_done_bytes, of.needed_bytes + of.rest_bytes);
    match of.phase {
        ClonePhase::Done if all == 0 => "not known".to_owned(),
        ClonePhase::Done if done >= all => "read".to_owned(),
        _ => format!("{} of {} MiB", done >> 20, all >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_says_what_is_read_and_how_much() {
        let mut of = CloneProgress {
            needed_done_bytes: 5 << 20,
            needed_bytes: 60 << 20,
            rest_done_bytes: 1 << 20,
            rest_bytes: 100 << 20,
            ..CloneProgress::default()
        };
        assert_eq!(progress(&of), "streamed 6 of 160 MiB, 5 of 60 needed first; what it needs first is being read");
        assert_eq!(cell(&of), "6 of 160 MiB");
        (of.phase, of.read_errors) = (ClonePhase::Done, 3);
        assert_eq!(progress(&of), "streamed 6 of 160 MiB, 5 of 60 needed first, 3 read errors; done");
        assert_eq!(cell(&of), "6 of 160 MiB");
        of.notes = vec!["reading was stopped".into()];
        assert!(fields(&of).contains("reading was stopped"));
        (of.needed_done_bytes, of.rest_done_bytes) = (of.needed_bytes, of.rest_bytes);
        assert_eq!(cell(&of), "read");
        // Of an earlier run of the daemon.
        of = CloneProgress { phase: ClonePhase::Done, ..CloneProgress::default() };
        assert_eq!((cell(&of).as_str(), progress(&of).as_str()), ("not known", "streamed not known; done"));
    }
}
