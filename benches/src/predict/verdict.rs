//! What the figures say, claim by claim: computed from the rows, with every place where a claim does not hold.

use serde::Serialize;

use super::row::{By, Row};
use super::tables::share;

/// A statement, where it was checked and where it fails.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Claim {
    pub(crate) claim: String,
    pub(crate) holds: bool,
    pub(crate) checked: usize,
    /// One line each.
    pub(crate) fails: Vec<String>,
}

impl Claim {
    /// From what was checked: nothing where it holds, else a line that says how it does not.
    pub(crate) fn new(claim: &str, checks: impl IntoIterator<Item = Option<String>>) -> Self {
        let (mut checked, mut fails) = (0, Vec::new());
        for fail in checks {
            checked += 1;
            fails.extend(fail);
        }
        Self { claim: claim.to_owned(), holds: fails.is_empty() && checked > 0, checked, fails }
    }
}

pub(crate) fn render(claims: &[Claim]) -> String {
    let mut text = "\nVerdict\n".to_owned();
    for claim in claims {
        let answer = match (claim.holds, claim.checked) {
            (true, _) => "yes",
            (false, 0) => "not measured",
            (false, _) => "no",
        };
        text += &format!("{}: {answer}", claim.claim);
        if !claim.fails.is_empty() {
            text += &format!(" ({} of {})", claim.fails.len(), claim.checked);
        }
        text.push('\n');
        for fail in &claim.fails {
            text += &format!("    {fail}\n");
        }
    }
    text
}

/// Sizes up to which caching alone is to be beaten even by the optimum's rule.
const OPT_UP_TO: f64 = 0.10;
/// Precision at which the misses left are compared.
const DIRECTION_PRECISION: f64 = 0.6;
/// Largest calibration error.
const MAX_ECE: f64 = 0.01;

/// What the untimed rows of all traces and sizes say.
pub(crate) fn of_rows(rows: &[Row]) -> Vec<Claim> {
    let ours: Vec<&Row> = rows.iter().filter(|row| is_ours(row)).collect();
    let at = |ours: &Row, by: By, policy: Option<&str>| -> Vec<&Row> {
        let same = |row: &&Row| row.trace == ours.trace && row.cache == ours.cache && row.latency_us.is_none();
        let of = |row: &&Row| row.by == by && policy.map_or(row.policy != "opt", |policy| row.policy == policy);
        rows.iter().filter(same).filter(of).collect()
    };
    let above = |ours: &Row, other: &Row| {
        let fails = ours.read_hit_ratio <= other.read_hit_ratio;
        let (hit, others) = (share(Some(ours.read_hit_ratio)), share(Some(other.read_hit_ratio)));
        fails.then(|| format!("{}: hit {hit}, {} {others}", place(ours), other.label()))
    };
    let each = |by, policy: Option<&'static str>| {
        ours.iter().flat_map(move |row| at(row, by, policy).into_iter().map(move |other| above(row, other)))
    };
    let best = |row: &Row| {
        let mut peers = at(row, By::Peers, None);
        peers.sort_by(|a, b| b.read_hit_ratio.total_cmp(&a.read_hit_ratio));
        peers.first().copied()
    };
    let precise = |row: &&Row| {
        let best = best(row)?;
        let (ours, theirs) = (share(Some(row.precision)), share(Some(best.precision)));
        let fails = row.precision < best.precision;
        Some(fails.then(|| format!("{}: precision {ours}, {} {theirs}", place(row), best.label())))
    };
    let halves = |row: &&Row| {
        let peer = *at(row, By::Peers, Some("markov+readahead")).first()?;
        let left = (1.0 - row.read_hit_ratio) / (1.0 - peer.read_hit_ratio);
        let fails = left > 0.5 || row.precision < DIRECTION_PRECISION;
        let told =
            format!("{}: {} of them left at precision {}", place(row), share(Some(left)), share(Some(row.precision)));
        Some(fails.then_some(told))
    };
    let calibrated = |of: fn(&Row) -> Option<f64>| {
        let check = move |row: &&Row| {
            let ece = of(row)?;
            Some((ece > MAX_ECE).then(|| format!("{}: {ece:.4}", place(row))))
        };
        ours.iter().filter_map(check)
    };
    let small = ours.iter().filter(|row| row.cache <= OPT_UP_TO + f64::EPSILON);
    let optimum = small.flat_map(|row| at(row, By::Peers, Some("opt")).into_iter().map(|other| above(row, other)));
    let same_lru = ours.iter().flat_map(|row| at(row, By::Libcachesim, Some("lru"))).filter_map(|theirs| {
        let ours = *at(theirs, By::Peers, Some("none")).first()?;
        let count = |row: &Row| (row.read_hits, row.demand_pages);
        let fails = count(ours) != count(theirs);
        Some(fails.then(|| format!("{}: {:?}, lcs lru {:?}", place(theirs), count(ours), count(theirs))))
    });
    vec![
        Claim::new("Hit ratio above every peer's on every trace at every size", each(By::Peers, None)),
        Claim::new("Precision no lower than that of the peer with the best hit ratio", ours.iter().filter_map(precise)),
        Claim::new("Hit ratio above the optimum without prefetch up to 10 %", optimum),
        Claim::new("Hit ratio above LRU, S3-FIFO, SIEVE, ARC of libcachesim", each(By::Libcachesim, None)),
        Claim::new("The peers' simulator and libcachesim count the same for LRU", same_lru),
        Claim::new("Half the misses of markov+readahead at precision >= .6", ours.iter().filter_map(halves)),
        Claim::new("Expected calibration error of issued pages <= .01", calibrated(|row| row.ece)),
        Claim::new("Expected calibration error of all predictions <= .01", calibrated(|row| row.ece_all)),
    ]
}

/// The row that stands for this project: everything on, defaults, untimed.
pub(crate) fn is_ours(row: &Row) -> bool {
    row.by == By::Prestage && row.policy == "prestage" && row.latency_us.is_none()
}

fn place(row: &Row) -> String {
    format!("{} at {} %", row.trace, row.cache * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(by: By, policy: &str, hit: f64, precision: f64) -> Row {
        let (trace, policy) = ("t".to_owned(), policy.to_owned());
        Row {
            trace,
            policy,
            by,
            cache: 0.05,
            read_hit_ratio: hit,
            precision,
            ece: Some(0.02),
            ece_all: Some(0.004),
            ..Row::default()
        }
    }

    #[test]
    fn a_claim_names_where_it_fails() {
        let rows = [
            row(By::Prestage, "prestage", 0.5, 0.7),
            row(By::Peers, "leap", 0.4, 0.9),
            row(By::Peers, "markov+readahead", 0.5, 0.6),
            row(By::Peers, "opt", 0.45, 0.0),
        ];
        let claims = of_rows(&rows);
        let fails: Vec<usize> = claims.iter().map(|claim| claim.fails.len()).collect();
        assert_eq!(fails, [1, 0, 0, 0, 0, 1, 1, 0]);
        assert_eq!(claims[0].fails, ["t at 5 %: hit .500, markov+readahead .500"]);
        let answers: Vec<(bool, usize)> = claims.iter().map(|claim| (claim.holds, claim.checked)).collect();
        assert_eq!(
            answers,
            [(false, 2), (true, 1), (true, 1), (false, 0), (false, 0), (false, 1), (false, 1), (true, 1),]
        );
        assert!(render(&claims).contains("libcachesim: not measured\n"));
    }

    #[test]
    fn rows_of_libcachesim_enter_the_verdict() {
        let hits = |row: Row, read_hits| Row { read_hits, ..row };
        let rows = [
            row(By::Prestage, "prestage", 0.5, 0.7),
            hits(row(By::Peers, "none", 0.1, 0.0), 10),
            hits(row(By::Libcachesim, "lru", 0.1, 0.0), 11),
            row(By::Libcachesim, "s3-fifo", 0.2, 0.0),
            row(By::Libcachesim, "sieve", 0.6, 0.0),
            row(By::Libcachesim, "arc", 0.3, 0.0),
        ];
        let claims = of_rows(&rows);
        let about = |words: &str| claims.iter().find(|claim| claim.claim.contains(words)).unwrap();
        let above = about("SIEVE, ARC");
        assert_eq!(
            (above.checked, above.fails.as_slice()),
            (4, &["t at 5 %: hit .500, lcs sieve .600".to_owned()][..])
        );
        assert_eq!(about("the same for LRU").fails, ["t at 5 %: (10, 0), lcs lru (11, 0)"]);
    }
}
