//! The table at the end of a run, and what it says in a few sentences.

use crate::record::{Boot, BootName, Phase, Run, ratio};

/// The middle one, or the mean of both middle ones.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

const HEAD: [&str; 13] = [
    "boot",
    "ready s",
    "program s",
    "reads",
    "RAM",
    "SSD",
    "store",
    "late",
    "waited s",
    "boot/program",
    "precision",
    "guest MB",
    "store MB",
];

#[allow(clippy::cast_precision_loss)] // shown with one decimal
fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", share * 100.0))
}

fn row(boot: &Boot) -> [String; 13] {
    let total = &boot.total;
    [
        boot.name.as_str().to_owned(),
        format!("{:.1}", boot.ready_s),
        format!("{:.1}", boot.program_s),
        total.reads.to_string(),
        total.served_ram.to_string(),
        total.served_ssd.to_string(),
        total.served_store.to_string(),
        total.prefetch_late.to_string(),
        format!("{:.2}", total.read_wait_s),
        format!("{:.2}/{:.2}", boot.boot.read_wait_s, boot.program.read_wait_s),
        percent(boot.precision),
        megabytes(total.guest_read_bytes),
        megabytes(total.store_read_bytes),
    ]
}

/// The table, its first column to the left and the others to the right.
fn aligned(rows: &[[String; 13]]) -> String {
    let mut text = String::new();
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            let width = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
            if column == 0 {
                text += &format!("{cell:<width$}");
            } else {
                text += &format!("  {cell:>width$}");
            }
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// Share of the straight boot's waiting time, for boot and program.
fn waits(straight: &Phase, phase: &Phase) -> String {
    if straight.read_wait_s > 0.0 {
        format!("{:.2} of the straight boot's waiting", phase.read_wait_s / straight.read_wait_s)
    } else {
        "no waiting in the straight boot".to_owned()
    }
}

pub(crate) fn render(run: &Run) -> String {
    let host = &run.host;
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(run.boots.iter().map(row));
    let mut text = format!(
        "{}, {} cores, {} MB; Linux {}; {}; {}\nguests run under {}; store: {}\n\n{}\n",
        host.cpu,
        host.cores,
        host.memory_bytes / 1_000_000,
        host.kernel,
        host.qemu,
        host.libvirt,
        run.accelerator,
        run.store,
        aligned(&rows)
    );
    text += "reads: requests of the guest, served from RAM, from SSD, after waiting for the store (late: for a prefetch in\n\
             flight). waited: all reads together, measured inside the guest. Boot and program count together, MB = 10^6 bytes.\n";
    let Some(straight) = run.boot(BootName::Straight) else { return text };
    for boot in run.boots.iter().filter(|boot| boot.name != BootName::Straight) {
        text += &format!(
            "{}: {} of the reads without waiting for the store; boot {}, program {}; {} of the guest's bytes from the store\n",
            boot.name.as_str(),
            percent(boot.without_store),
            waits(&straight.boot, &boot.boot),
            waits(&straight.program, &boot.program),
            percent(ratio(boot.total.store_read_bytes, boot.total.guest_read_bytes)),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut long = HEAD.map(str::to_owned);
        long[3] = "1234567890".to_owned();
        let text = aligned(&[HEAD.map(str::to_owned), long]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0].chars().count(), lines[1].chars().count());
        assert_eq!(lines[0].find("RAM"), lines[1].find("RAM"));
    }
}
