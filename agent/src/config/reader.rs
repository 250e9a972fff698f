//! Reads and merges TOML files while remembering where each key stands, so that a message can name file and line.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::value::Setting;
use super::{ConfigError, ConfigProblem};

/// Where a key stands.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// File, or `--set` for the command line.
    pub(super) file: Rc<str>,
    /// From 1; `None` on the command line.
    pub(super) line: Option<usize>,
}

/// A TOML value with places.
#[derive(Debug, Clone)]
pub(super) enum Value {
    String(String),
    /// Value and the radix it was written in.
    Integer(i64, u32),
    Float(f64),
    Bool(bool),
    Datetime,
    Array(Vec<Entry>),
    Table(Table),
}

impl Value {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::String(_) => "text",
            Self::Integer(..) => "a whole number",
            Self::Float(_) => "a fraction",
            Self::Bool(_) => "true or false",
            Self::Datetime => "a date",
            Self::Array(_) => "a list",
            Self::Table(_) => "a table",
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) value: Value,
    pub(super) place: Place,
}

pub(super) type Table = BTreeMap<String, Entry>;

/// Collects everything that is wrong, so that an operator sees it all at once.
#[derive(Debug, Default)]
pub(super) struct Problems(pub(super) Vec<ConfigProblem>);

impl Problems {
    pub(super) fn add(&mut self, place: &Place, key: impl Into<String>, message: impl Into<String>) {
        self.0.push(ConfigProblem {
            file: place.file.as_ref().to_owned(),
            line: place.line,
            key: Some(key.into()),
            message: message.into(),
        });
    }
}

/// Parses one file's text.
pub(super) fn parse(file: &Path, text: &str) -> Result<Table, ConfigError> {
    let name: Rc<str> = file.to_string_lossy().into();
    match DeTable::parse(text) {
        Ok(table) => Ok(convert_table(table.get_ref(), &name, text)),
        Err(error) => Err(ConfigError::one(ConfigProblem {
            file: name.as_ref().to_owned(),
            line: error.span().map(|span| line_of(text, span.start)),
            key: None,
            message: format!("not valid TOML: {}", error.message()),
        })),
    }
}

/// Parses `section.key=value` from the command line; a value that is not TOML is taken as text.
pub(super) fn parse_override(text: &str) -> Result<Table, ConfigError> {
    let place = Place { file: format!("--set {text}").into(), line: None };
    let refuse = |message: &str| {
        ConfigError::one(ConfigProblem {
            file: place.file.as_ref().to_owned(),
            line: None,
            key: None,
            message: message.to_owned(),
        })
    };
    let (key, value) = text.split_once('=').ok_or_else(|| refuse("expected section.key=value"))?;
    let (section, key) = key.trim().split_once('.').ok_or_else(|| refuse("expected section.key=value"))?;
    let document = format!("v = {value}");
    let parsed = DeTable::parse(&document).ok().and_then(|table| {
        let mut table = convert_table(table.get_ref(), &place.file, &document);
        if table.len() == 1 { table.remove("v").map(|entry| entry.value) } else { None }
    });
    let value = parsed.unwrap_or_else(|| Value::String(value.trim().to_owned()));
    let inner = Table::from([(key.to_owned(), Entry { value, place: place.clone() })]);
    Ok(Table::from([(section.to_owned(), Entry { value: Value::Table(inner), place })]))
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

fn convert_table(table: &DeTable<'_>, file: &Rc<str>, text: &str) -> Table {
    let place = |offset| Place { file: Rc::clone(file), line: Some(line_of(text, offset)) };
    table
        .iter()
        .map(|(key, value)| {
            let entry = Entry { value: convert(value, file, text), place: place(key.span().start) };
            (key.get_ref().to_string(), entry)
        })
        .collect()
}

fn convert(value: &Spanned<DeValue<'_>>, file: &Rc<str>, text: &str) -> Value {
    match value.get_ref() {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(number) => {
            // What does not fit is out of every range; the nearest end of i64 makes the message right.
            let fallback = if number.as_str().starts_with('-') { i64::MIN } else { i64::MAX };
            Value::Integer(i64::from_str_radix(number.as_str(), number.radix()).unwrap_or(fallback), number.radix())
        }
        DeValue::Float(number) => Value::Float(number.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(yes) => Value::Bool(*yes),
        DeValue::Datetime(_) => Value::Datetime,
        DeValue::Array(items) => Value::Array(
            items
                .iter()
                .map(|item| Entry {
                    value: convert(item, file, text),
                    place: Place { file: Rc::clone(file), line: Some(line_of(text, item.span().start)) },
                })
                .collect(),
        ),
        DeValue::Table(table) => Value::Table(convert_table(table, file, text)),
    }
}

/// Lays `over` on `base`: tables key by key, lists of tables one after the other, all else replaced.
pub(super) fn merge(base: &mut Table, over: Table) {
    for (key, entry) in over {
        match base.get_mut(&key) {
            None => {
                base.insert(key, entry);
            }
            Some(old) => match (&mut old.value, entry.value) {
                (Value::Table(old), Value::Table(new)) => merge(old, new),
                (Value::Array(old), Value::Array(new))
                    if old.iter().chain(&new).all(|item| matches!(item.value, Value::Table(_))) =>
                {
                    old.extend(new);
                }
                (_, value) => *old = Entry { value, place: entry.place },
            },
        }
    }
}

/// One section being read: every key asked for is remembered, what is left over is unknown.
#[derive(Debug)]
pub(super) struct Section {
    pub(super) name: String,
    table: Table,
    known: Vec<&'static str>,
}

impl Section {
    /// Takes a section out of the document; an absent one is empty.
    pub(super) fn take(document: &mut Table, name: &str, problems: &mut Problems) -> Self {
        let table = match document.remove(name) {
            None => Table::new(),
            Some(Entry { value: Value::Table(table), .. }) => table,
            Some(Entry { value, place }) => {
                problems.add(&place, name, format!("expected a section `[{name}]`, found {}", value.kind()));
                Table::new()
            }
        };
        Self::new(name, table)
    }

    pub(super) fn new(name: &str, table: Table) -> Self {
        Self { name: name.to_owned(), table, known: Vec::new() }
    }

    /// The setting behind `key`, or `default`; what is wrong is noted and the default goes on.
    pub(super) fn get<T: Setting>(
        &mut self,
        key: &'static str,
        default: T,
        check: impl Fn(&T) -> Result<(), String>,
        problems: &mut Problems,
    ) -> T {
        self.optional(key, check, problems).unwrap_or(default)
    }

    pub(super) fn optional<T: Setting>(
        &mut self,
        key: &'static str,
        check: impl Fn(&T) -> Result<(), String>,
        problems: &mut Problems,
    ) -> Option<T> {
        self.known.push(key);
        let entry = self.table.remove(key)?;
        match T::read(&entry.value).and_then(|value| check(&value).map(|()| value)) {
            Ok(value) => Some(value),
            Err(message) => {
                problems.add(&entry.place, format!("{}.{key}", self.name), message);
                None
            }
        }
    }

    /// Notes every key nobody asked for. `elsewhere` finds the section that has such a key.
    pub(super) fn finish(self, problems: &mut Problems, elsewhere: impl Fn(&str) -> Option<&'static str>) {
        for (key, entry) in &self.table {
            let hint = match (closest(key, &self.known), elsewhere(key)) {
                (Some(near), _) => format!("; did you mean `{near}`?"),
                (None, Some(section)) => format!("; it belongs in `[{section}]`"),
                (None, None) => format!("; known here: {}", self.known.join(", ")),
            };
            let path = format!("{}.{key}", self.name);
            let message = format!("unknown key `{path}`{hint}");
            problems.0.push(ConfigProblem {
                file: entry.place.file.as_ref().to_owned(),
                line: entry.place.line,
                key: Some(path),
                message,
            });
        }
    }
}

/// The known word nearest to `word`, when near enough to be a slip of the pen.
pub(super) fn closest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let (distance, near) = known.iter().map(|known| (edits(word, known), *known)).min()?;
    (distance <= (word.len() / 3).clamp(1, 3)).then_some(near)
}

/// Edit distance with swaps of neighbours (optimal string alignment).
fn edits(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let change = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j] + 1).min(rows[i][j - 1] + 1).min(rows[i - 1][j - 1] + change);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}
