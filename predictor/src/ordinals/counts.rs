//! Adaptive counts of symbols by the symbols before: prediction without a model.
//!
//! Orders 0, 1 and 2, each falling back on the shorter one as far as it has seen little (as in prediction by partial
//! matching: Cleary and Witten 1984). Counts age, so that what a stream did lately counts most.

/// Weight of the shorter context in a longer one, in observations.
const BACK_OFF: f32 = 3.0;
/// A row's sum at which its counts are halved.
const LIMIT: u16 = 512;
/// An observation, in the unit of the counts.
const SEEN: u16 = 2;

/// Counts of `N` symbols. 2 KiB × (N + 1) and up: see [`Counts::new`].
#[derive(Clone, Debug)]
pub struct Counts<const N: usize> {
    none: [u16; N],
    one: Vec<[u16; N]>,
    /// By a hash of both symbols before.
    two: Vec<[u16; N]>,
    before: usize,
    last: usize,
}

/// Rows of order 2; contexts that collide share one.
const ROWS: usize = 1024;

impl<const N: usize> Default for Counts<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> Counts<N> {
    /// Nothing seen yet. Holds `(1024 + N + 1) × 2 N` bytes.
    #[must_use]
    pub fn new() -> Self {
        Self { none: [0; N], one: vec![[0; N]; N], two: vec![[0; N]; ROWS], before: 0, last: 0 }
    }

    /// Heap memory, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        (self.one.capacity() + self.two.capacity()) * size_of::<[u16; N]>()
    }

    fn row(&self) -> usize {
        (self.before * N + self.last).wrapping_mul(0x9E37_79B1) >> 7 & (ROWS - 1)
    }

    /// Probabilities of the next symbol by contexts of no, one and two symbols before; each sums to 1 and none is 0.
    #[must_use]
    pub fn predict(&self) -> [[f32; N]; 3] {
        let mut shorter = [1.0 / N as f32; N];
        [&self.none, &self.one[self.last], &self.two[self.row()]].map(|counts| {
            let unit = f32::from(SEEN);
            let total = counts.iter().map(|count| f32::from(*count)).sum::<f32>() / unit + BACK_OFF;
            for (p, count) in shorter.iter_mut().zip(counts) {
                *p = (f32::from(*count) / unit + BACK_OFF * *p) / total;
            }
            shorter
        })
    }

    /// The next symbol. Those from `N` on are taken for the last one.
    pub fn push(&mut self, symbol: u8) {
        let symbol = usize::from(symbol).min(N - 1);
        let row = self.row();
        for counts in [&mut self.none, &mut self.one[self.last], &mut self.two[row]] {
            counts[symbol] += SEEN;
            if counts.iter().sum::<u16>() >= LIMIT {
                counts.iter_mut().for_each(|count| *count /= 2);
            }
        }
        (self.before, self.last) = (self.last, symbol);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_learn_what_their_context_tells_and_stay_distributions() {
        let mut counts = Counts::<64>::new();
        let mut bits = [0f32; 3];
        for n in 0..5000usize {
            let symbol = [1u8, 1, 2, 3, 2][n % 5];
            let predicted = counts.predict();
            for (bits, row) in bits.iter_mut().zip(&predicted) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-4 && row.iter().all(|p| *p > 0.0));
                if n >= 4000 {
                    *bits -= row[usize::from(symbol)].log2() / 1000.0;
                }
            }
            counts.push(symbol);
        }
        // 1.52 bits without context; after a 1 or a 2 either of two; after two symbols it is certain
        assert!(bits[0] > 1.4 && bits[1] > 0.6 && bits[1] < 0.9 && bits[2] < 0.05, "{bits:?}");
    }
}
