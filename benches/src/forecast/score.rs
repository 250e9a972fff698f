//! The script's figures.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Who we are among the forecasters.
pub(super) const OURS: &str = "prestage";

/// One forecaster on one metric of one data set. `p..`: pinball loss, `r..`: the same / the best peer's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Line {
    pub(super) group: String,
    pub(super) peer: String,
    pub(super) n: u64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p95: f64,
    pub(super) pmax: f64,
    pub(super) in90: f64,
    pub(super) inmax: f64,
    pub(super) over: f64,
    pub(super) short: f64,
    pub(super) ms: Option<f64>,
    pub(super) r50: f64,
    pub(super) r90: f64,
    pub(super) r95: f64,
    pub(super) rmax: f64,
}

/// Geometric means of the ratios over all metrics.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Ratios {
    pub(super) r50: f64,
    pub(super) r90: f64,
    pub(super) r95: f64,
    pub(super) rmax: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Scores {
    pub(super) metrics: Vec<Line>,
    pub(super) mean_ratios: BTreeMap<String, Ratios>,
}

impl Scores {
    pub(super) fn read(text: &str) -> Result<Self> {
        serde_json::from_str(text).context("the script's scores are not as expected")
    }

    pub(super) fn ours(&self) -> impl Iterator<Item = &Line> {
        self.metrics.iter().filter(|line| line.peer == OURS)
    }

    /// The others on the same metric.
    pub(super) fn peers_of<'a>(&'a self, ours: &'a Line) -> impl Iterator<Item = &'a Line> {
        self.metrics.iter().filter(|line| line.peer != OURS && line.group == ours.group)
    }

    pub(super) fn table(&self) -> String {
        let mut text = "p50 p90 p95: pinball loss of the steps, pmax: of the hourly maximum's .95 quantile; r..: the same / best peer's\n\
            in90: steps within .05 and .95 quantile; inmax: hourly maxima below their .95 quantile; over: mean excess of that quantile\n"
            .to_owned();
        let mut groups: Vec<&str> = self.metrics.iter().map(|line| line.group.as_str()).collect();
        groups.sort_unstable();
        groups.dedup();
        for group in groups {
            let mut lines: Vec<&Line> = self.metrics.iter().filter(|line| line.group == group).collect();
            lines.sort_by(|a, b| a.p95.total_cmp(&b.p95));
            let points = lines.iter().map(|line| line.n).max().unwrap_or(0);
            text += &format!(
                "\n{group}, {points} points\n{:<16}{:>8}{:>8}{:>8}{:>9}{:>7}{:>7}{:>10}{:>8}{:>7}{:>7}{:>7}{:>7}\n",
                "", "p50", "p90", "p95", "pmax", "in90", "inmax", "over", "ms", "r50", "r90", "r95", "rmax"
            );
            for line in lines {
                let ms = line.ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.3}"));
                text += &format!(
                    "{:<16}{:>8.3}{:>8.3}{:>8.3}{:>9.3}{:>7.3}{:>7.3}{:>10.3}{ms:>8}{:>7.3}{:>7.3}{:>7.3}{:>7.3}\n",
                    line.peer,
                    line.p50,
                    line.p90,
                    line.p95,
                    line.pmax,
                    line.in90,
                    line.inmax,
                    line.over,
                    line.r50,
                    line.r90,
                    line.r95,
                    line.rmax
                );
            }
        }
        text += "\ngeometric mean of the ratios over all metrics\n";
        for (peer, mean) in &self.mean_ratios {
            text += &format!("{peer:<16}{:>8.3}{:>8.3}{:>8.3}{:>9.3}\n", mean.r50, mean.r90, mean.r95, mean.rmax);
        }
        text
    }
}
