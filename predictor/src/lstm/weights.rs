//! A model's weights: nine parts of fixed shape, as bytes and as the kernels want them.
//!
//! As bytes (`weight_file.rs`): magic "PSTGLSTM"; shape: symbols, ops, sizes, gaps, symbol width, context width, hidden, gates, leads in
//! accesses (3); the parts of [`PARTS`].

use super::isa::LANES;
use super::{CONTEXT_WIDTH, GAPS, GATES, HIDDEN, INPUT, Lead, OPS, Path, SIZES, SYMBOL_WIDTH, SYMBOLS, Token};
use crate::weight_file::Format;
pub use crate::weight_file::{Part, WeightsError};

/// Version of the format; raised whenever the meaning of the bytes changes.
pub const VERSION: u32 = 1;
const FORMAT: Format = Format { what: "model", magic: "PSTGLSTM", version: VERSION };
const SHAPE: [u16; 11] = [
    SYMBOLS as u16,
    OPS as u16,
    SIZES as u16,
    GAPS as u16,
    SYMBOL_WIDTH as u16,
    CONTEXT_WIDTH as u16,
    HIDDEN as u16,
    GATES as u16,
    1,
    4,
    8,
];

/// The parts, in the order of the bytes. Columns of `input`, `recurrent` and `bias` are gates (input, forget, cell,
/// output) of [`HIDDEN`] units each; those of `head` and `head_bias` are leads of [`SYMBOLS`] each. The layer's input is
/// the row of `symbol` followed by the sum of the rows of `op`, `size` and `gap`.
pub const PARTS: [Part; 9] = [
    Part { name: "symbol", rows: SYMBOLS, columns: SYMBOL_WIDTH },
    Part { name: "op", rows: OPS, columns: CONTEXT_WIDTH },
    Part { name: "size", rows: SIZES, columns: CONTEXT_WIDTH },
    Part { name: "gap", rows: GAPS, columns: CONTEXT_WIDTH },
    Part { name: "input", rows: INPUT, columns: GATES * HIDDEN },
    Part { name: "recurrent", rows: HIDDEN, columns: GATES * HIDDEN },
    Part { name: "bias", rows: 1, columns: GATES * HIDDEN },
    Part { name: "head", rows: HIDDEN, columns: Lead::ALL.len() * SYMBOLS },
    Part { name: "head_bias", rows: 1, columns: Lead::ALL.len() * SYMBOLS },
];

/// Number of weights of a model.
pub const COUNT: usize = {
    let (mut sum, mut part) = (0, 0);
    while part < PARTS.len() {
        sum += PARTS[part].len();
        part += 1;
    }
    sum
};

/// A model that is ready to run.
#[derive(Clone, Debug)]
pub struct Weights {
    /// The parts of [`PARTS`], one behind the other.
    flat: Vec<f32>,
    pub(super) path: Path,
    /// What a token adds to the gates: embedding times `input`, computed once. The bias is in the symbols' rows.
    pub(super) symbol: Vec<Gates>,
    pub(super) op: Vec<Gates>,
    pub(super) size: Vec<Gates>,
    pub(super) gap: Vec<Gates>,
    /// By [`LANES`] units: their four gates.
    pub(super) recurrent: Vec<Panel>,
    /// By lead: its 64 symbols, [`LANES`] at a time.
    pub(super) heads: Vec<(Panel, [[f32; LANES]; 4])>,
}

/// For each group of [`LANES`] units their four gates, side by side, as the kernels go through them.
pub(super) type Gates = [[[f32; LANES]; GATES]; HIDDEN / LANES];

/// Four vectors for each hidden unit that is multiplied with them: 16 KiB, one after the other as they are read.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(super) struct Panel(pub(super) [[[[f32; LANES]; 4]; LANES]; HIDDEN / LANES]);

impl Weights {
    /// Makes a model of its parts, one behind the other in the order and shapes of [`PARTS`]; it runs on the fastest
    /// [`Path`] of this processor.
    ///
    /// # Errors
    /// [`WeightsError::Count`] and [`WeightsError::Value`].
    pub fn new(flat: Vec<f32>) -> Result<Self, WeightsError> {
        if flat.len() != COUNT {
            let (what, found) = (FORMAT.what, flat.len());
            return Err(WeightsError::Count { what, found, expected: COUNT, most: COUNT });
        }
        let mut rest = flat.as_slice();
        let [symbol, op, size, gap, input, recurrent, bias, head, head_bias] = {
            let mut parts = [&[][..]; PARTS.len()];
            for (slot, part) in parts.iter_mut().zip(PARTS) {
                (*slot, rest) = rest.split_at(part.len());
                FORMAT.check(part, slot)?;
            }
            parts
        };
        let (symbol_input, context_input) = input.split_at(SYMBOL_WIDTH * GATES * HIDDEN);
        let no_bias = [0.0; GATES * HIDDEN];
        Ok(Self {
            path: Path::best(),
            symbol: gate_table(symbol, symbol_input, bias),
            op: gate_table(op, context_input, &no_bias),
            size: gate_table(size, context_input, &no_bias),
            gap: gate_table(gap, context_input, &no_bias),
            recurrent: (0..HIDDEN / LANES)
                .map(|group| panel(|unit, gate, lane| recurrent[unit * GATES * HIDDEN + column(group, gate, lane)]))
                .collect(),
            heads: (0..Lead::ALL.len())
                .map(|lead| {
                    let at = |vector: usize, lane: usize| lead * SYMBOLS + vector * LANES + lane;
                    (
                        panel(|unit, vector, lane| head[unit * Lead::ALL.len() * SYMBOLS + at(vector, lane)]),
                        std::array::from_fn(|vector| std::array::from_fn(|lane| head_bias[at(vector, lane)])),
                    )
                })
                .collect(),
            flat,
        })
    }

    /// The same model on other instructions, for tests and measurements.
    #[must_use]
    pub fn on(mut self, path: Path) -> Self {
        self.path = path;
        self
    }

    /// The parts, one behind the other in the order and shapes of [`PARTS`].
    #[must_use]
    pub fn flat(&self) -> &[f32] {
        &self.flat
    }

    /// Serialises the model, see the module's head. Deterministic.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        FORMAT.write(&SHAPE, &self.flat)
    }

    /// Makes a model of what [`Weights::to_bytes`] gave.
    ///
    /// # Errors
    /// See [`WeightsError`]. Any bytes are refused or accepted without panic.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WeightsError> {
        Self::new(FORMAT.read(bytes, |_| (SHAPE, COUNT))?)
    }

    /// Memory of the model.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let tables = self.symbol.len() + self.op.len() + self.size.len() + self.gap.len();
        let heads = self.heads.len() * size_of::<(Panel, [[f32; LANES]; 4])>();
        4 * self.flat.len() + tables * size_of::<Gates>() + self.recurrent.len() * size_of::<Panel>() + heads
    }

    /// What `token` adds to the gates, in four tables; a token's parts are below the tables' lengths by its type.
    #[inline(always)]
    pub(super) fn of_token(&self, token: Token) -> [&Gates; 4] {
        [
            &self.symbol[usize::from(token.symbol())],
            &self.op[usize::from(token.op())],
            &self.size[usize::from(token.size())],
            &self.gap[usize::from(token.gap())],
        ]
    }
}

/// Column of `input`, `recurrent` and `bias` that holds one gate of unit `lane` of a group.
fn column(group: usize, gate: usize, lane: usize) -> usize {
    gate * HIDDEN + group * LANES + lane
}

fn panel(value: impl Fn(usize, usize, usize) -> f32) -> Panel {
    let rows = |unit| std::array::from_fn(|vector| std::array::from_fn(|lane| value(unit, vector, lane)));
    Panel(std::array::from_fn(|group| std::array::from_fn(|unit| rows(group * LANES + unit))))
}

/// Rows of `embedding` times `input`, plus `bias`; summed in double precision, since it is done once.
fn gate_table(embedding: &[f32], input: &[f32], bias: &[f32]) -> Vec<Gates> {
    let width = input.len() / (GATES * HIDDEN);
    let sum = |row: &[f32], column: usize| {
        let products =
            row.iter().enumerate().map(|(i, value)| f64::from(*value) * f64::from(input[i * GATES * HIDDEN + column]));
        (products.sum::<f64>() + f64::from(bias[column])) as f32
    };
    let gates = |row: &[f32]| {
        std::array::from_fn(|group| {
            std::array::from_fn(|gate| std::array::from_fn(|lane| sum(row, column(group, gate, lane))))
        })
    };
    embedding.chunks_exact(width).map(gates).collect()
}
