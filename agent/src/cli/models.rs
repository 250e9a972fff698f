//! `prestagectl model`: commands and what they print, at most 80 columns wide.
//!
//! - `transfer.rs`: `export` and `import`

mod transfer;

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use prestage_integration::api::models::{
    ChampionChanged, ContestStatus, Model, ModelDetail, ModelList, ModelMetrics, ModelState, RollbackRequest,
    ThresholdRequest, Thresholds, TrainRequest, TrainStarted,
};
use serde_json::json;

use super::render::{ago, now_unix_ms};
use super::table::{Align, Fields, Table, printable};
use super::{Failure, answer};
use crate::client::{Client, encode};
use crate::config::units::{human_bytes, human_duration};

/// Width of a terminal nobody made wider.
const WIDTH: usize = 80;
/// What the other columns of the list leave of it, with ids of four digits and ages of years.
const SCOPE_WIDTH: usize = 16;

#[derive(Debug, Subcommand)]
pub enum ModelCommand {
    /// All models and where they stand
    #[command(long_about = "All models and where they stand.\n\n  \
        ACCESSES   trained on\n  \
        BITS       mean cost of predicting the next access, on accesses held out; less is better\n  \
        GAIN%      less than an order-2 Markov model's by so much\n  \
        TOP1%      accesses whose likeliest prediction was right\n  \
        AGE        since it is in its state\n\n\
        A model in training becomes a shadow, which predicts beside the champion without effect. It is promoted when it \
        saves enough bits an access for sure, else rejected.")]
    List,
    /// One model, its contest and what became of it
    Show {
        /// From `model list`
        id: i64,
    },
    /// Train a model in the background
    Train(TrainArgs),
    /// Measure a model on the latest history
    Evaluate {
        /// From `model list`
        id: i64,
    },
    /// Put a model to use, whatever its contest with the champion says
    Promote {
        /// From `model list`
        id: i64,
    },
    /// Take the last promotion back
    Rollback {
        /// Of one storage: its identity or a disk on it [default: global]
        #[arg(long, value_name = "STORAGE")]
        scope: Option<String>,
    },
    /// Write a model to a file, for another host
    Export {
        /// From `model list`
        id: i64,
        /// New file, or `-` for standard output [default: model-ID.prestage]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Take up a model that another host exported
    #[command(long_about = "Take up a model that another host exported.\n\n\
        It becomes a shadow, in place of the one there is: it predicts beside the champion and is promoted when it proves \
        better on this host's guests. `model promote` puts it to use at once. A damaged file, and a model that this version \
        cannot run, are refused.\n\nWithout --storage and --all it is for what it was for on its own host.")]
    Import {
        /// What `model export` wrote
        file: PathBuf,
        /// For one storage alone: its identity or a disk on it
        #[arg(long, value_name = "STORAGE", conflicts_with = "all")]
        storage: Option<String>,
        /// For all storages
        #[arg(long)]
        all: bool,
    },
    /// Lowest probability at which blocks are read ahead: show or set it
    #[command(long_about = "Lowest probability at which blocks are read ahead.\n\n\
        Without P it is shown, with P it is set, at once and over restarts: of one storage (its identity or a disk on it), or \
        without STORAGE of all that have none of their own. P is 0 to 1, or `default` to unset it.")]
    Threshold {
        /// STORAGE, P, or both in this order; without any all thresholds are shown
        #[arg(num_args = 0..=2, value_name = "STORAGE|P")]
        words: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    /// For one storage alone: its identity or a disk on it
    #[arg(long, value_name = "STORAGE", conflicts_with = "all")]
    storage: Option<String>,
    /// For all storages (default)
    #[arg(long)]
    all: bool,
    /// Go on with an interrupted training
    #[arg(long)]
    resume: bool,
}

pub(super) async fn run(
    command: ModelCommand,
    client: &Client,
    json: bool,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let now = now_unix_ms();
    match command {
        ModelCommand::List => {
            answer(out, json, &client.get::<ModelList>("/v1/models").await?, |reply| list(reply, now))
        }
        ModelCommand::Show { id } => {
            let reply: ModelDetail = client.get(&format!("/v1/models/{id}")).await?;
            answer(out, json, &reply, |reply| show(reply, now))
        }
        ModelCommand::Train(TrainArgs { storage, all: _, resume }) => {
            let reply: TrainStarted = client.post("/v1/models/train", &TrainRequest { storage, resume }).await?;
            answer(out, json, &reply, started)
        }
        ModelCommand::Evaluate { id } => {
            let reply: ModelMetrics = client.post(&format!("/v1/models/{id}/evaluate"), &json!({})).await?;
            answer(out, json, &reply, metrics)
        }
        ModelCommand::Promote { id } => {
            let reply: ChampionChanged = client.post(&format!("/v1/models/{id}/promote"), &json!({})).await?;
            answer(out, json, &reply, champion)
        }
        ModelCommand::Rollback { scope } => {
            let reply: ChampionChanged = client.post("/v1/models/rollback", &RollbackRequest { scope }).await?;
            answer(out, json, &reply, champion)
        }
        ModelCommand::Export { id, out: file } => transfer::export(client, id, file, json, out).await,
        ModelCommand::Import { file, storage, all } => {
            let scope = if all { Some("global".to_owned()) } else { storage };
            let reply = transfer::import(client, &file, scope.as_deref()).await?;
            answer(out, json, &reply, transfer::imported)
        }
        ModelCommand::Threshold { words } => threshold(&words, client, json, out).await,
    }
}

/// `None`: to be unset.
fn probability(word: &str) -> Option<Option<f64>> {
    match word {
        "default" => Some(None),
        number => number.parse().ok().map(Some),
    }
}

async fn threshold(words: &[String], client: &Client, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let request = match words {
        [] => None,
        [word] => probability(word).map(|probability| ThresholdRequest { storage: None, probability }),
        [storage, word, ..] => match probability(word) {
            Some(probability) => Some(ThresholdRequest { storage: Some(storage.clone()), probability }),
            None => {
                let word = printable(word);
                return Err(Failure::Usage(format!("`{word}` is not a probability; it is 0 to 1, or `default`")));
            }
        },
    };
    if let Some(request) = &request {
        request.validate().map_err(Failure::Usage)?;
        let reply: Thresholds = client.put("/v1/thresholds", request).await?;
        return answer(out, json, &reply, thresholds);
    }
    let mut reply: Thresholds = client.get("/v1/thresholds").await?;
    if let [storage] = words {
        let own = |entry: &prestage_integration::api::models::StorageThreshold| {
            entry.storage == *storage || entry.disks.contains(storage)
        };
        if !reply.storages.iter().any(own) {
            // An unknown name is an error, a known one without a threshold of its own has the default.
            client.get::<serde_json::Value>(&format!("/v1/profiles/{}", encode(storage))).await?;
        }
        reply.storages.retain(own);
    }
    answer(out, json, &reply, thresholds)
}

fn state(model: &Model) -> String {
    match model.state {
        ModelState::Training if model.trained_tokens.is_none() => "interrupted".to_owned(),
        state => name(state).to_owned(),
    }
}

fn name(state: ModelState) -> &'static str {
    match state {
        ModelState::Training => "training",
        ModelState::Shadow => "shadow",
        ModelState::Champion => "champion",
        ModelState::Retired => "retired",
        ModelState::Rejected => "rejected",
    }
}

/// Keeps the end, which tells paths and exports apart.
fn shortened(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let tail: String = text.chars().skip(length - width.saturating_sub(1)).collect();
    format!("…{tail}")
}

fn list(list: &ModelList, now: u64) -> String {
    let mut text = String::new();
    if list.models.is_empty() {
        text.push_str("no models yet; one is trained when there is enough history\n");
    } else {
        let mut table = Table::new(&[
            ("ID", Align::Right),
            ("STATE", Align::Left),
            ("ACCESSES", Align::Right),
            ("BITS", Align::Right),
            ("GAIN%", Align::Right),
            ("TOP1%", Align::Right),
            ("AGE", Align::Left),
            ("SCOPE", Align::Left),
        ]);
        for model in &list.models {
            let next = model.metrics.as_ref().and_then(|metrics| metrics.leads.first());
            let cell = |value: Option<f64>, decimals: usize| {
                value.map_or_else(|| "-".to_owned(), |value| format!("{value:.decimals$}"))
            };
            table.row([
                model.id.to_string(),
                state(model),
                if model.tokens == 0 { "-".to_owned() } else { model.tokens.to_string() },
                cell(next.map(|lead| lead.bits), 2),
                cell(next.filter(|lead| lead.baseline_bits > 0.0).map(|lead| gain(lead.bits, lead.baseline_bits)), 1),
                cell(next.map(|lead| 100.0 * lead.top1), 1),
                human_duration(Duration::from_millis(now.saturating_sub(model.changed_unix_ms))),
                shortened(&printable(&model.scope), SCOPE_WIDTH),
            ]);
        }
        text.push_str(&table.render());
    }
    for model in list.models.iter().filter(|model| model.state == ModelState::Rejected && !model.reason.is_empty()) {
        text.push_str(&wrapped(&format!("{} rejected: {}", model.id, model.reason), ""));
    }
    for scope in &list.waiting {
        text.push_str(&wrapped(&format!("{scope} waits for its training"), ""));
    }
    text
}

fn gain(bits: f64, baseline: f64) -> f64 {
    100.0 * (baseline - bits) / baseline
}

fn metrics(metrics: &ModelMetrics) -> String {
    let mut table = Table::new(&[
        ("AHEAD", Align::Right),
        ("BITS", Align::Right),
        ("MARKOV", Align::Right),
        ("GAIN%", Align::Right),
        ("TOP1%", Align::Right),
        ("MARKOV", Align::Right),
    ]);
    for lead in &metrics.leads {
        table.row([
            lead.lead.to_string(),
            format!("{:.3}", lead.bits),
            format!("{:.3}", lead.baseline_bits),
            if lead.baseline_bits > 0.0 {
                format!("{:.1}", gain(lead.bits, lead.baseline_bits))
            } else {
                "-".to_owned()
            },
            format!("{:.1}", 100.0 * lead.top1),
            format!("{:.1}", 100.0 * lead.baseline_top1),
        ]);
    }
    format!("on {} accesses\n{}", metrics.tokens, table.render())
}

fn contest(contest: &ContestStatus) -> String {
    let rival = contest.champion.map_or_else(|| "prediction without a model".to_owned(), |id| format!("model {id}"));
    let ContestStatus { accesses, accesses_most, saved_bits, saved_least, saved_most, margin_bits, .. } = contest;
    wrapped(
        &format!(
            "Against {rival}: saves {saved_bits:.3} bits an access, {saved_least:.3} to {saved_most:.3} with {:.0} % confidence, \
             over {accesses} of at most {accesses_most} accesses. Promoted when it surely saves {margin_bits}.",
            100.0 * contest.confidence
        ),
        "",
    )
}

fn show(detail: &ModelDetail, now: u64) -> String {
    let model = &detail.model;
    let mut fields = Fields::default();
    fields.add("model", format!("{}, {}", model.id, model.kind)).add("scope", &model.scope);
    fields.add("state", format!("{} since {}", state(model), ago(model.changed_unix_ms, now)));
    if let Some(parent) = model.parent {
        fields.add("champion then", parent);
    }
    if model.tokens > 0 {
        let (from, to) = (ago(model.trained_from_unix_ms, now), ago(model.trained_to_unix_ms, now));
        fields.add("trained on", format!("{} accesses, from {from} to {to}", model.tokens));
    }
    if let Some(trained) = model.trained_tokens {
        fields.add("so far", format!("{trained} accesses, repeats counted"));
    }
    fields.add("seed", model.seed).add("size", human_bytes(model.weights_bytes));
    let mut text = fields.render();
    if let Some(found) = &model.metrics {
        text.push('\n');
        text.push_str(&metrics(found));
    }
    if let Some(found) = &model.contest {
        text.push('\n');
        text.push_str(&contest(found));
    }
    text.push('\n');
    for change in &detail.changes {
        let from = change.from.map_or_else(|| "made".to_owned(), |from| name(from).to_owned());
        let (to, actor, at) = (name(change.to), printable(&change.actor), ago(change.at_unix_ms, now));
        text.push_str(&format!("{at}: {from} -> {to}, by {actor}\n"));
        text.push_str(&wrapped(&change.reason, "  "));
    }
    text
}

fn started(reply: &TrainStarted) -> String {
    let scope = printable(&reply.scope);
    match reply.model {
        Some(id) if reply.resumed => format!("model {id} of {scope}: training goes on\n"),
        Some(id) => format!("model {id} of {scope}: training, {} accesses to learn from\n", reply.accesses),
        None => format!("{scope} waits for another training to end\n"),
    }
}

fn champion(reply: &ChampionChanged) -> String {
    let scope = printable(&reply.scope);
    let now = match reply.champion {
        Some(id) => format!("model {id} predicts for {scope} now"),
        None => format!("{scope} has no model of its own in use now"),
    };
    match reply.before {
        Some(before) => format!("{now}, in place of model {before}\n"),
        None => format!("{now}\n"),
    }
}

fn thresholds(reply: &Thresholds) -> String {
    let mut text = match reply.default {
        Some(default) => format!("default: {default} (configured: {})\n", reply.configured),
        None => format!("default: {} (as configured)\n", reply.configured),
    };
    for entry in &reply.storages {
        let name = if entry.disks.is_empty() { entry.storage.clone() } else { entry.disks.join(", ") };
        text.push_str(&wrapped(&format!("{name}: {}", entry.probability), ""));
    }
    text
}

/// Lines of at most [`WIDTH`] columns, broken between words where that can be.
fn wrapped(text: &str, indent: &str) -> String {
    let mut lines = String::new();
    let mut line = String::new();
    for word in printable(text).split_whitespace() {
        if !line.is_empty() && indent.len() + line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.push_str(&format!("{indent}{line}\n"));
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.push_str(&format!("{indent}{line}\n"));
    lines
}
