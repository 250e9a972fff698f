//! `explain`: why a block was or was not prefetched, the answer first.

use std::io::Write;

use clap::Args;
use prestage_integration::api::types::{Attempt, Explained, Fate, Governor};

use super::args::disk_name;
use super::table::{Align, Fields, Table, printable};
use super::{Failure, answer};
use crate::client::{Client, encode};
use crate::config::units::{human_bytes, parse_bytes};

#[derive(Debug, Args)]
#[command(
    long_about = "Say where a page of a disk is cached, who expects the guest to read it, and what became of earlier \
    proposals.\n\n  \
    SCORE        the expert's own\n  \
    PROBABILITY  by the record of such predictions\n  \
    WEIGHT       in the combination; - where the likeliest vote alone decides\n  \
    DUE          when the guest is expected to read it\n\n\
    A page is worth loading where the wait that it saves if the guest reads it (gain) is\n\
    more than what it costs if not (waste). The threshold says what that is: at 0.125,\n\
    seven pages in vain cost as much as one miss. The governor bounds what is loaded in\n\
    vain whatever the probabilities say; learned sets (phase) do not ask it."
)]
pub struct ExplainArgs {
    /// Name of the disk
    #[arg(value_parser = disk_name)]
    pub disk: String,
    /// Byte offset, such as 1073741824 or 1GiB; its page of 4 KiB is explained
    #[arg(value_parser = parse_bytes)]
    pub offset: u64,
}

pub(super) async fn run(client: &Client, args: ExplainArgs, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let path = format!("/v1/disks/{}/explain?offset={}", encode(&args.disk), args.offset);
    answer(out, json, &client.get::<Explained>(&path).await?, text)
}

fn text(explained: &Explained) -> String {
    let Explained { disk, offset_bytes, .. } = explained;
    let mut text = wrapped(&format!("disk {disk}, offset {offset_bytes}: {}.", sentence(explained)));
    if !explained.votes.is_empty() {
        text.push_str("\nexpected now:\n");
        text.push_str(&votes(explained));
    }
    if !explained.attempts.is_empty() {
        text.push_str("\nproposed:\n");
        text.push_str(&attempts(&explained.attempts));
    }
    let mut fields = Fields::default();
    fields.add("cached", cached(explained));
    if let Some(touched) = explained.touched {
        fields.add(
            "guest",
            format!("read or wrote it within the last {}", short(touched.ago_us.saturating_add(1_000_000))),
        );
    }
    let on = if explained.prefetch { "on" } else { "OFF (prefetch.enabled)" };
    fields.add("prefetch", format!("{on}, from probability {} on", least(explained.threshold)));
    if let Some(vain_cost) = explained.vain_cost {
        fields.add("in vain", format!("a page costs {vain_cost:.2} of a miss, by that probability"));
    }
    fields.add("governor", governor(&explained.governor));
    if let Some(miss_us) = explained.miss_us {
        fields.add("a miss costs", format!("{} on this disk", short_us(miss_us)));
        if let (Some(vote), Some(vain_cost)) = (explained.votes.first(), explained.vain_cost) {
            fields.add("expected", expected(f64::from(vote.calibrated), miss_us, miss_us * f64::from(vain_cost)));
        }
    }
    let budget = explained.budget;
    let (under_way, window) = (human_bytes(budget.in_flight_bytes), human_bytes(budget.window_bytes));
    fields.add("store", format!("{under_way} of {window} under way, {} waiting", human_bytes(budget.queued_bytes)));
    fields.add("record", format!("proposals of the last {}", short(explained.record_us)));
    text.push('\n');
    text.push_str(&fields.render());
    text
}

fn governor(governor: &Governor) -> String {
    let left = match u64::try_from(governor.budget_bytes) {
        Ok(left) => human_bytes(left),
        Err(_) => format!("-{}", human_bytes(governor.budget_bytes.unsigned_abs())),
    };
    let lets = match governor.floor {
        Some(floor) => format!("from {} on", least(floor)),
        None => "nothing".to_owned(),
    };
    format!("hands out {lets}; {left} of {} left to waste", human_bytes(governor.most_bytes))
}

/// Gain against waste at a probability, where a hit saves and a page in vain costs so many microseconds.
fn expected(p: f64, saves_us: f64, costs_us: f64) -> String {
    let part = |p: f64, us: f64| format!("{p:.2} x {} = {}", short_us(us), short_us(p * us));
    format!("gain {}, waste {}", part(p, saves_us), part(1.0 - p, costs_us))
}

/// The answer.
fn sentence(explained: &Explained) -> String {
    let by =
        |attempt: &Attempt| format!("{} ago ({}, {:.2})", short(attempt.ago_us), attempt.expert, attempt.probability);
    let place = explained.place;
    if let Some(last) = explained.attempts.first() {
        let by = by(last);
        return match last.fate {
            Fate::Used => format!("prefetched {by} and read by the guest in time"),
            Fate::Late => format!("prefetched {by}, too late: the guest had to wait for the rest of it"),
            Fate::Unread => format!("prefetched {by}; it is in RAM and the guest has not read it yet"),
            Fate::Loading => format!("being prefetched, proposed {by}"),
            Fate::Queued => format!("waiting to be prefetched, proposed {by}; the store's budget is in use"),
            Fate::Evicted => format!("prefetched {by}, but it left RAM before the guest read it"),
            Fate::Refused => format!("not prefetched: proposed {by}, but the prefetch queue was full"),
            Fate::SwitchedOff => format!("not prefetched: proposed {by}, but prefetching was switched off"),
            Fate::BelowThreshold => {
                format!("not prefetched: proposed {by}, below the threshold of {}", least(last.threshold))
            }
            Fate::Overtaken if place.ssd && !place.ram => {
                format!("not prefetched: proposed {by}, but the SSD tier has it")
            }
            Fate::Overtaken => {
                format!("proposed {by}, but not loaded: the guest asked first, or it was cached already")
            }
        };
    }
    let because = match explained.votes.first() {
        None if explained.touched.is_some() => "the guest touched it lately, there was nothing to fetch".to_owned(),
        None => "no expert expects it to be read".to_owned(),
        Some(vote) if vote.calibrated < explained.floor => {
            format!(
                "the likeliest vote ({}, {:.2}) is below the threshold of {}",
                vote.expert,
                vote.calibrated,
                least(explained.floor)
            )
        }
        Some(vote) if explained.governor.withholds => {
            let (expert, p) = (&vote.expert, vote.calibrated);
            match explained.governor.floor {
                Some(floor) => {
                    let floor = least(floor);
                    format!("{expert} expects it ({p:.2}), but after pages in vain the governor asks for {floor}")
                }
                None => {
                    format!("{expert} expects it ({p:.2}), but after pages in vain the governor lets nothing through")
                }
            }
        }
        Some(_) if explained.touched.is_some() => "the guest touched it lately, there is nothing to fetch".to_owned(),
        Some(vote) => format!("{} expects it ({:.2}), but has not proposed it yet", vote.expert, vote.calibrated),
    };
    let cached = if place.ram {
        "cached because the guest touched it, and not by a prefetch on record"
    } else {
        "not prefetched"
    };
    format!("{cached}: {because}")
}

fn cached(explained: &Explained) -> &'static str {
    let place = explained.place;
    match (place.ram, place.ssd) {
        (true, _) if place.unread => "in RAM, not read yet",
        (true, true) => "in RAM and on the SSD",
        (true, false) => "in RAM",
        (false, _) if place.loading => "on its way into RAM",
        (false, true) => "on the SSD",
        (false, false) if place.queued => "no; waits in the prefetch queue",
        (false, false) => "no",
    }
}

fn votes(explained: &Explained) -> String {
    let mut table = Table::new(&[
        ("EXPERT", Align::Left),
        ("SCORE", Align::Right),
        ("PROBABILITY", Align::Right),
        ("WEIGHT", Align::Right),
        ("DUE", Align::Left),
    ]);
    for vote in &explained.votes {
        let due = vote.due_us.map(|due_us| match due_us {
            0.. => format!("in {}", short(due_us.unsigned_abs())),
            _ => format!("{} ago", short(due_us.unsigned_abs())),
        });
        table.row([
            vote.expert.clone(),
            format!("{:.2}", vote.raw),
            format!("{:.2}", vote.calibrated),
            vote.weight.map_or_else(|| "-".to_owned(), |weight| format!("{weight:.2}")),
            due.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table.render()
}

fn attempts(attempts: &[Attempt]) -> String {
    let mut table = Table::new(&[
        ("WHEN", Align::Left),
        ("EXPERT", Align::Left),
        ("PROBABILITY", Align::Right),
        ("THRESHOLD", Align::Right),
        ("WHAT BECAME OF IT", Align::Left),
    ]);
    for attempt in attempts {
        let fate = match attempt.fate {
            Fate::BelowThreshold => "below the threshold",
            Fate::SwitchedOff => "prefetching was off",
            Fate::Refused => "refused, queue full",
            Fate::Queued => "waits for budget",
            Fate::Loading => "being loaded",
            Fate::Unread => "in RAM, not read yet",
            Fate::Used => "read in time",
            Fate::Late => "read, late",
            Fate::Evicted => "left RAM unread",
            Fate::Overtaken => "not loaded",
        };
        table.row([
            format!("{} ago", short(attempt.ago_us)),
            attempt.expert.clone(),
            format!("{:.2}", attempt.probability),
            least(attempt.threshold),
            fate.to_owned(),
        ]);
    }
    table.render()
}

/// A threshold: 0.125 shown as 0.12 would be above a probability of 0.12 and seem not to be.
fn least(threshold: f32) -> String {
    let text = format!("{threshold:.3}");
    text.strip_suffix('0').map_or(text.clone(), str::to_owned)
}

/// A sentence in lines of at most 80 characters.
fn wrapped(sentence: &str) -> String {
    let (mut text, mut column) = (String::new(), 0);
    for word in sentence.split(' ') {
        let width = word.chars().count();
        if column > 0 && column + 1 + width > 80 {
            text.push('\n');
            column = 0;
        } else if column > 0 {
            text.push(' ');
            column += 1;
        }
        text.push_str(&printable(word));
        column += width;
    }
    text.push('\n');
    text
}

/// A time from microseconds to days, short.
fn short(us: u64) -> String {
    match us {
        0..60_000_000 => short_us(us as f64),
        _ => crate::config::units::human_duration(std::time::Duration::from_micros(us)),
    }
}

pub(super) fn short_us(us: f64) -> String {
    match us {
        _ if us < 999.5 => format!("{us:.0} us"),
        _ if us < 9_995.0 => format!("{:.2} ms", us / 1e3),
        _ if us < 999_500.0 => format!("{:.0} ms", us / 1e3),
        _ => format!("{:.1} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prestage_integration::api::types::Vote;

    #[test]
    fn a_threshold_keeps_the_digits_that_decide() {
        assert_eq!([0.5, 0.125, 0.3, 0.05, 1.0].map(least), ["0.50", "0.125", "0.30", "0.05", "1.00"]);
    }

    #[test]
    fn what_lies_in_ram_is_not_said_to_be_left_to_the_ssd() {
        let attempt = Attempt {
            ago_us: 1_000_000,
            expert: "phase".to_owned(),
            probability: 0.98,
            threshold: 0.125,
            fate: Fate::Overtaken,
        };
        let mut explained = Explained { attempts: vec![attempt], ..Explained::default() };
        explained.place.ssd = true;
        assert!(sentence(&explained).ends_with("but the SSD tier has it"), "{}", sentence(&explained));
        explained.place.ram = true;
        assert!(sentence(&explained).ends_with("or it was cached already"), "{}", sentence(&explained));
    }

    #[test]
    fn what_the_governor_holds_back_is_said_with_its_floor() {
        let vote = Vote { expert: "log".into(), calibrated: 0.31, weight: Some(1.0), ..Vote::default() };
        let governor = Governor { floor: Some(0.62), budget_bytes: -4096, most_bytes: 16 << 20, withholds: true };
        let mut explained =
            Explained { votes: vec![vote], threshold: 0.125, floor: 0.125, governor, ..Explained::default() };
        let expects = "not prefetched: log expects it (0.31), but after pages in vain the governor";
        assert_eq!(sentence(&explained), format!("{expects} asks for 0.62"));
        assert!(text(&explained).contains("hands out from 0.62 on; -4.0 KiB of 16 MiB left to waste"));
        explained.governor.floor = None;
        assert_eq!(sentence(&explained), format!("{expects} lets nothing through"));
        // What the threshold rules out is not the governor's doing.
        explained.floor = 0.5;
        assert!(sentence(&explained).contains("below the threshold of 0.50"));
    }
}
