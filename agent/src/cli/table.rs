//! Aligned text: tables and lists of names and values.

use std::io::IsTerminal;

/// Which side of a column is even.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// A table with a header line; columns are as wide as their widest cell.
#[derive(Debug)]
pub(super) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(columns: &[(&'static str, Align)]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        // Names come from other programs: a line break or an escape in one must not reach the terminal.
        self.rows.push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    /// On a terminal that is too narrow, columns of long text follow below their rows: nothing is cut off, and what goes
    /// into a file or a pipe is always a row a line.
    pub(super) fn render(&self) -> String {
        let width = std::io::stdout().is_terminal().then(terminal_size::terminal_size).flatten();
        self.render_within(width.map_or(usize::MAX, |(width, _)| usize::from(width.0)))
    }

    fn render_within(&self, most: usize) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
            cells.max().unwrap_or(0).max(self.columns[column].0.chars().count())
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let header: Vec<String> = self.columns.iter().map(|(name, _)| (*name).to_owned()).collect();
        let below = self.below(&widths, most);
        let mut text = String::new();
        for (number, row) in std::iter::once(&header).chain(&self.rows).enumerate() {
            let mut line = String::new();
            for (column, (_, align)) in self.columns.iter().enumerate().filter(|(column, _)| !below.contains(column)) {
                let cell = row.get(column).map_or("", String::as_str);
                let gap = " ".repeat(widths[column] - cell.chars().count());
                if column > 0 {
                    line.push_str("  ");
                }
                match align {
                    Align::Left => line.extend([cell, &gap]),
                    Align::Right => line.extend([gap.as_str(), cell]),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
            if number > 0 {
                let cells = below.iter().filter_map(|column| Some((&header[*column], row.get(*column)?)));
                cells.filter(|(_, cell)| !cell.is_empty()).for_each(|(name, cell)| {
                    text.push_str(&format!("    {name} {cell}\n"));
                });
            }
        }
        text
    }

    /// Columns that are to follow below their rows, in order: the widest text, until the rest fits. The first names the row
    /// and stays.
    fn below(&self, widths: &[usize], most: usize) -> Vec<usize> {
        let mut candidates: Vec<usize> = (1..widths.len()).filter(|at| self.columns[*at].1 == Align::Left).collect();
        candidates.sort_by_key(|at| widths[*at]);
        let mut all = widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1);
        let mut below = Vec::new();
        while all > most
            && let Some(at) = candidates.pop()
        {
            all -= widths[at] + 2;
            below.push(at);
        }
        below.sort_unstable();
        below
    }
}

/// Names and values, the values even.
#[derive(Debug, Default)]
pub(super) struct Fields(Vec<(String, String)>);

impl Fields {
    pub(super) fn add(&mut self, name: &str, value: impl ToString) -> &mut Self {
        self.0.push((name.to_owned(), printable(&value.to_string())));
        self
    }

    pub(super) fn render(&self) -> String {
        let width = self.0.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        self.0
            .iter()
            .map(|(name, value)| format!("{name}:{}{value}\n", " ".repeat(width + 2 - name.chars().count())))
            .collect()
    }
}

/// Control characters escaped.
pub(super) fn printable(text: &str) -> String {
    let unsafe_to_print = |c: char| c.is_control() || changes_direction(c);
    if text.chars().any(unsafe_to_print) {
        text.chars().flat_map(|c| if unsafe_to_print(c) { c.escape_default().collect() } else { vec![c] }).collect()
    } else {
        text.to_owned()
    }
}

/// Characters that are not seen and put others elsewhere: a name could show as another (UAX 9, UTR 36), or break a line.
fn changes_direction(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_stranger_named_does_nothing_to_the_terminal() {
        let evil = "a\u{1b}[31m\u{202e}gnp\u{2066}\u{9b}\u{feff}\u{2028}";
        let shown = printable(evil);
        assert!(shown.is_ascii() && !shown.contains('\u{1b}') && shown.contains("\\u{202e}gnp"), "{shown}");
        assert_eq!(printable("Müller 日本 עברית"), "Müller 日本 עברית");
    }

    #[test]
    fn text_that_does_not_fit_follows_below_its_row_and_nothing_is_lost() {
        let columns = [
            ("NAME", Align::Left),
            ("SIZE", Align::Right),
            ("STORE", Align::Left),
            ("READS", Align::Right),
            ("STATE", Align::Left),
        ];
        let mut table = Table::new(&columns);
        table.row(["web1", "1.0 GiB", "/srv/images/production/web1.raw", "12345", "ok"].map(str::to_owned));
        table.row(["b", "2 B", "/b", "0"].map(str::to_owned));
        let wide = "\
NAME     SIZE  STORE                            READS  STATE
web1  1.0 GiB  /srv/images/production/web1.raw  12345  ok
b         2 B  /b                                   0
";
        assert_eq!((table.render_within(usize::MAX), table.render_within(60)), (wide.to_owned(), wide.to_owned()));
        let narrow = "\
NAME     SIZE  READS  STATE
web1  1.0 GiB  12345  ok
    STORE /srv/images/production/web1.raw
b         2 B      0
    STORE /b
";
        assert_eq!(table.render_within(59), narrow);
        // Numbers stay: a table of them is as wide as it is.
        let least = table.render_within(1);
        assert!(least.starts_with("NAME     SIZE  READS\nweb1  1.0 GiB  12345\n    STORE /srv"), "{least}");
        assert!(least.contains("\n    STATE ok\nb         2 B      0\n    STORE /b\n"), "{least}");
    }
}
