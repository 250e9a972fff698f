//! What the figures say, claim by claim: computed from the rows, with every place where a claim does not hold.

use serde::Serialize;

use super::cases;
use super::report::{Figure, Row};
use super::servers::Who;

/// A statement, where it was checked and where it fails.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Claim {
    pub(super) claim: String,
    pub(super) holds: bool,
    pub(super) checked: usize,
    /// One line for each that was checked: what was measured.
    pub(super) seen: Vec<String>,
}

/// What one comparison says, and whether it is as claimed.
type Check = (bool, String);

impl Claim {
    pub(super) fn new(claim: impl Into<String>, checks: impl IntoIterator<Item = Check>) -> Self {
        let checks: Vec<Check> = checks.into_iter().collect();
        let holds = !checks.is_empty() && checks.iter().all(|(holds, _)| *holds);
        let seen =
            checks.iter().map(|(holds, text)| format!("{}{text}", if *holds { "" } else { "fails: " })).collect();
        Self { claim: claim.into(), holds, checked: checks.len(), seen }
    }
}

pub(super) fn render(claims: &[Claim]) -> String {
    let mut text = "\nVerdict\n".to_owned();
    for Claim { claim, holds, checked, seen } in claims {
        let answer = match (holds, checked) {
            (true, _) => "yes",
            (false, 0) => "not measured",
            (false, _) => "no",
        };
        text += &format!("{claim}: {answer}\n");
        seen.iter().for_each(|line| text += &format!("    {line}\n"));
    }
    text
}

/// Share of the reads that RAM must have served for a row to be one of hits.
pub(super) const HITS: f64 = 0.999;

fn row<'a>(rows: &'a [Row], case: &str, who: Who) -> Option<&'a Row> {
    rows.iter().find(|row| row.case == case && row.who == who)
}

/// Compares ours with another's in one case, by the rounds: both are measured a moment apart in each, so that the median
/// of the rounds' ratios is what a busy host disturbs least.
fn at_least(rows: &[Row], case: &'static str, ours: Who, other: Who, ratio: f64) -> Option<Check> {
    let (ours, other) = (row(rows, case, ours)?, row(rows, case, other)?);
    let ratios = ours.rounds.iter().zip(&other.rounds).map(|(a, b)| a.iops / b.iops);
    let seen = crate::table::median(ratios);
    Some((seen >= ratio, format!("{case}: {seen:.2} times the requests a second of {}, {ratio} wanted", other.server)))
}

/// The 99th percentile is no higher.
fn no_later(rows: &[Row], case: &'static str, other: Who) -> Option<Check> {
    let (ours, other) = (row(rows, case, Who::Prestaged)?, row(rows, case, other)?);
    let text = format!("{case}: p99 {:.1} us, {} {:.1} us", ours.p99_us, other.server, other.p99_us);
    Some((ours.p99_us <= other.p99_us, text))
}

/// What all rows together say.
pub(super) fn of_rows(rows: &[Row]) -> Vec<Claim> {
    let hits = |other: Who| {
        let wanted = [(cases::HIT_QD1, 1.5), (cases::HIT_QD32, 2.0), (cases::HIT_SEQUENTIAL, 1.0)];
        let faster =
            wanted.into_iter().filter_map(move |(case, ratio)| at_least(rows, case, Who::Prestaged, other, ratio));
        let later = [cases::HIT_QD1, cases::HIT_QD32].into_iter().filter_map(move |case| no_later(rows, case, other));
        faster.chain(later)
    };
    let stores = [cases::MISS_QD1, cases::MISS_QD32, cases::WRITE_QD1, cases::WRITE_QD32];
    let direct =
        |other: Who| stores.into_iter().filter_map(move |case| at_least(rows, case, Who::Prestaged, other, 0.95));
    let nbd = [cases::NBD_QD1, cases::NBD_QD32, cases::NBD_SEQUENTIAL].into_iter().filter_map(|case| {
        let better = [Who::Nbdkit, Who::QemuNbd].into_iter().filter_map(|who| row(rows, case, who));
        let better = better.max_by(|a, b| a.iops.total_cmp(&b.iops))?;
        at_least(rows, case, Who::PrestagedNbd, better.who, 1.0)
    });
    let from_ram = rows.iter().filter(|row| cases::ALL_HITS.contains(&row.case)).filter_map(|row| {
        let share = row.ram_share?;
        Some((share >= HITS, format!("{}: {:.3} % from RAM", row.case, share * 100.0)))
    });
    vec![
        Claim::new("What counts as hits was served from RAM", from_ram),
        Claim::new("RAM hits: 1.5 times qemu-storage-daemon at QD1, 2 times at QD32, p99 no higher", hits(Who::Qsd)),
        Claim::new("The same against one with a polling I/O thread and io_uring", hits(Who::QsdTuned)),
        Claim::new("Misses and write-through: .95 times qemu-storage-daemon with direct I/O", direct(Who::Qsd)),
        Claim::new("The same against one with a polling I/O thread and io_uring", direct(Who::QsdTuned)),
        Claim::new("NBD: no slower than the better of nbdkit and qemu-nbd", nbd),
    ]
}

/// A figure that must not be above a bound.
pub(super) fn at_most(claim: &str, figures: &[Figure], names: &str, bound: f64) -> Claim {
    let checks = figures.iter().filter(|figure| figure.name.starts_with(names)).map(|figure| {
        (figure.value <= bound, format!("{}: {:.2} {}, at most {bound} wanted", figure.name, figure.value, figure.unit))
    });
    Claim::new(claim, checks)
}

/// What a request costs, over rows of one kind, is the same within a share.
pub(super) fn flat(claim: &str, rows: &[Row], within: f64) -> Claim {
    let costs: Vec<(&'static str, f64)> = rows
        .iter()
        .filter(|row| cases::ALL_SCALES.contains(&row.case))
        .map(|row| (row.case, row.cpu_us_per_request))
        .collect();
    let Some(base) = costs.first().map(|(_, cost)| *cost) else { return Claim::new(claim, []) };
    let checks = costs.iter().skip(1).map(|(case, cost)| {
        let off = cost / base - 1.0;
        (
            off.abs() <= within,
            format!("{case}: {cost:.2} us of processor time a request, {:+.0} % of the first", off * 100.0),
        )
    });
    Claim::new(claim, checks)
}

#[cfg(test)]
mod tests {
    use super::super::report::Sample;
    use super::*;

    fn row(case: &'static str, who: Who, iops: f64, p99_us: f64) -> Row {
        // nobody else counts where an answer came from
        let ram_share = matches!(who, Who::Prestaged).then_some(1.0);
        let sample = Sample { iops, p50_us: 1.0, p99_us, cpu_us_per_request: iops / 1e3, ram_share };
        Row::new(case, who, 4096, vec![sample; 3])
    }

    #[test]
    fn a_claim_says_what_was_measured_and_where_it_fails() {
        let rows = [
            row(cases::HIT_QD1, Who::Prestaged, 140.0, 5.0),
            row(cases::HIT_QD1, Who::Qsd, 100.0, 5.0),
            row(cases::HIT_QD32, Who::Prestaged, 200.0, 7.0),
            row(cases::HIT_QD32, Who::Qsd, 100.0, 6.0),
            row(cases::MISS_QD1, Who::Prestaged, 95.0, 6.0),
            row(cases::MISS_QD1, Who::Qsd, 100.0, 6.0),
            row(cases::NBD_QD1, Who::PrestagedNbd, 95.0, 6.0),
            row(cases::NBD_QD1, Who::Nbdkit, 90.0, 6.0),
            row(cases::NBD_QD1, Who::QemuNbd, 96.0, 6.0),
        ];
        let claims = of_rows(&rows);
        let answers: Vec<(bool, usize)> = claims.iter().map(|claim| (claim.holds, claim.checked)).collect();
        assert_eq!(answers, [(true, 2), (false, 4), (false, 0), (true, 1), (false, 0), (false, 1)]);
        assert!(
            claims[1].seen[0].starts_with("fails: ") && claims[1].seen[0].contains("1.40 times"),
            "{:?}",
            claims[1]
        );
        assert!(!claims[1].seen[1].starts_with("fails") && claims[1].seen[3].starts_with("fails: "), "{:?}", claims[1]);
        assert!(render(&claims).contains("I/O thread and io_uring: not measured\n"));
    }

    #[test]
    fn misses_called_hits_are_found_out() {
        let mut rows = [row(cases::HIT_QD1, Who::Prestaged, 140.0, 5.0)];
        rows[0].ram_share = Some(0.99);
        assert!(!of_rows(&rows)[0].holds);
    }

    #[test]
    fn cost_that_grows_with_the_disks_is_found() {
        let [one, many] = [cases::ALL_SCALES[0], cases::ALL_SCALES[3]];
        let rows = |cost| [row(one, Who::Prestaged, 1000.0, 1.0), row(many, Who::Prestaged, cost, 1.0)];
        assert!(flat("", &rows(1190.0), 0.2).holds && flat("", &rows(810.0), 0.2).holds);
        assert!(!flat("", &rows(1210.0), 0.2).holds && !flat("", &[], 0.2).holds);
    }
}
