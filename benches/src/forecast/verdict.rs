//! What the scores say, claim by claim.

use prestage_agent::forecast::Timing;

use super::score::{Line, OURS, Scores};
use crate::predict::verdict::Claim;

/// Largest mean ratio to the best peer.
const RATIO: f64 = 0.95;
/// What quantiles promise, and how far they may be off.
const WITHIN: f64 = 0.02;
/// Milliseconds of a machine's four forecasts.
const MACHINE_MS: f64 = 1.0;
const METRICS: f64 = 4.0;

pub(super) fn of(scores: &Scores, timing: &Timing) -> Vec<Claim> {
    let ours: Vec<&Line> = scores.ours().collect();
    let lower = ours.iter().flat_map(|line| {
        [(".5", line.r50), (".9", line.r90), (".95", line.r95)].map(|(quantile, ratio)| {
            (ratio >= 1.0).then(|| format!("{} at {quantile}: {ratio:.3} of the best peer's", line.group))
        })
    });
    let mean = scores.mean_ratios.get(OURS);
    let mean = mean.into_iter().flat_map(|mean| {
        [(".5", mean.r50), (".9", mean.r90), (".95", mean.r95)]
            .map(|(quantile, ratio)| (ratio > RATIO).then(|| format!("at {quantile}: {ratio:.3}")))
    });
    let promised = |value: f64, promise: f64, group: &str| {
        ((value - promise).abs() > WITHIN).then(|| format!("{group}: {value:.3}, not {promise} ± {WITHIN}"))
    };
    let interval = ours.iter().map(|line| promised(line.in90, 0.9, &line.group));
    let maximum = ours.iter().map(|line| promised(line.inmax, 0.95, &line.group));
    let cheaper = ours.iter().map(|line| {
        let best =
            scores.peers_of(line).filter(|peer| peer.inmax >= line.inmax).min_by(|a, b| a.over.total_cmp(&b.over))?;
        (line.over >= best.over)
            .then(|| format!("{}: {:.3}, {} {:.3} at {:.3}", line.group, line.over, best.peer, best.over, best.inmax))
    });
    let ms = METRICS * timing.median.as_secs_f64() * 1e3;
    let quick = (timing.forecasts > 0).then(|| (ms > MACHINE_MS).then(|| format!("{ms:.3} ms")));
    vec![
        Claim::new("Pinball loss at .5, .9, .95 lower than the best peer's on every metric", lower),
        Claim::new("Mean ratio to the best peer at most .95", mean),
        Claim::new("The .05 to .95 interval covers .90 ± .02 on every metric", interval),
        Claim::new("The hourly maximum's .95 quantile covers .95 ± .02 on every metric", maximum),
        Claim::new("That quantile is lower than that of every peer that covers as much", cheaper),
        Claim::new("At most 1 ms for a machine's four metrics", quick),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(ours: f64, over: f64, inmax: f64) -> Scores {
        let line = |peer: &str, ratio: f64, over: f64, inmax: f64| {
            format!(
                r#"{{"group":"a/cpu","peer":"{peer}","n":8,"p50":1,"p90":1,"p95":1,"pmax":1,"in90":0.9,"inmax":{inmax},
                "instep":0.8,"over":{over},"short":0,"over_raw":1,"ms":null,"r50":{ratio},"r90":{ratio},"r95":{ratio},"rmax":1}}"#
            )
        };
        let ratios = |ratio: f64| format!(r#"{{"r50":{ratio},"r90":{ratio},"r95":{ratio},"rmax":1}}"#);
        Scores::read(&format!(
            r#"{{"metrics":[{},{}],"mean_ratios":{{"prestage":{},"peer":{}}}}}"#,
            line("peer", 1.0, 10.0, 0.95),
            line("prestage", ours, over, inmax),
            ratios(ours),
            ratios(1.0)
        ))
        .unwrap()
    }

    #[test]
    fn a_claim_fails_where_its_figure_does() {
        let timing = Timing { forecasts: 1, median: std::time::Duration::from_micros(100), ..Timing::default() };
        let holds = |scores: &Scores| of(scores, &timing).iter().map(|claim| claim.holds).collect::<Vec<_>>();
        assert_eq!(holds(&scores(0.9, 9.0, 0.95)), [true; 6]);
        assert_eq!(holds(&scores(0.97, 11.0, 0.95)), [true, false, true, true, false, true]);
        // a peer that covers less is not compared with
        assert_eq!(holds(&scores(1.0, 11.0, 0.98)), [false, false, true, false, true, true]);
        let slow = Timing { median: std::time::Duration::from_micros(300), ..timing };
        assert!(!of(&scores(0.9, 9.0, 0.95), &slow)[5].holds);
    }
}
