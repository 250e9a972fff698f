//! Tokens from the database's history.

use std::collections::BTreeMap;

use prestage_predictor::{Access, Op};

use super::Token;
use super::scope::Scope;
use super::train::{ShouldStop, TokenSource, Tokens};
use crate::store::segment::{AccessOp, AccessRecord};
use crate::store::{SegmentRow, Store, StoreError};

/// Turns the accesses of one stream, in order, into tokens.
pub trait Tokeniser {
    /// `None` for an access that a model does not read.
    fn push(&mut self, access: &Access) -> Option<Token>;
}

impl Tokeniser for prestage_predictor::ordinals::Tokeniser {
    fn push(&mut self, access: &Access) -> Option<Token> {
        prestage_predictor::ordinals::Tokeniser::push(self, access)
    }
}

/// Makes a tokeniser for a stream that begins.
pub type NewTokeniser = fn() -> Box<dyn Tokeniser>;

/// The history of all streams (machine and storage), each a sequence.
#[derive(Debug)]
pub struct HistoryTokens {
    /// For short questions, asked by threads that are waited for.
    store: Store,
    /// For the accesses, read by a thread of idle priority.
    reader: Store,
    tokeniser: NewTokeniser,
}

impl HistoryTokens {
    /// # Errors
    /// The database cannot be opened once more: these reads take long and must hold up no others.
    pub fn new(store: &Store, tokeniser: NewTokeniser) -> Result<Self, StoreError> {
        Ok(Self { store: store.clone(), reader: store.with_own_reader()?, tokeniser })
    }

    /// Segments that end within `range`, latest first.
    fn segments(store: &Store, scope: &Scope, range: (u64, u64)) -> Result<Vec<SegmentRow>, StoreError> {
        let storages = match scope {
            Scope::Storage(identity) => vec![identity.clone()],
            Scope::Global => store.storages()?,
        };
        let mut segments = Vec::new();
        for storage in storages {
            segments.extend(store.segments(&storage, None, range.0, u64::MAX)?);
        }
        segments.retain(|segment| segment.to_us <= range.1);
        segments.sort_by_key(|segment| std::cmp::Reverse((segment.to_us, segment.id)));
        Ok(segments)
    }
}

impl TokenSource for HistoryTokens {
    fn accesses(&self, scope: &Scope) -> Result<u64, String> {
        let segments = Self::segments(&self.store, scope, (0, u64::MAX)).map_err(|error| error.to_string())?;
        Ok(segments.iter().map(|segment| segment.accesses).sum())
    }

    /// Whole segments, as many of the latest as there is room for: the range of their ends gives the same ones again.
    fn tokens(
        &self,
        scope: &Scope,
        range: Option<(u64, u64)>,
        most: u64,
        stop: ShouldStop<'_>,
    ) -> Result<Tokens, String> {
        let segments =
            Self::segments(&self.reader, scope, range.unwrap_or((0, u64::MAX))).map_err(|error| error.to_string())?;
        let mut room = most;
        let chosen = segments.into_iter().take_while(|segment| {
            let fits = segment.accesses <= room;
            room = room.saturating_sub(segment.accesses);
            fits
        });
        let mut chosen: Vec<SegmentRow> = chosen.collect();
        chosen.reverse();
        // By storage and machine.
        let mut streams: BTreeMap<(String, String), Stream> = BTreeMap::new();
        for segment in &chosen {
            if stop() {
                break;
            }
            let records = match self.reader.segment(segment.id) {
                Ok(records) => records,
                // Retention took it meanwhile, or it is damaged: the others are worth as much as before.
                Err(error @ (StoreError::NotFound { .. } | StoreError::Segment(_))) => {
                    tracing::warn!(segment = segment.id, %error, "segment of history left out of training");
                    continue;
                }
                Err(error) => return Err(error.to_string()),
            };
            let key = (segment.storage.clone(), segment.vm.clone());
            let new = || Stream { tokeniser: (self.tokeniser)(), tokens: Vec::new() };
            let Stream { tokeniser, tokens } = streams.entry(key).or_insert_with(new);
            tokens.extend(records.iter().filter_map(|record| tokeniser.push(&access(record))));
        }
        let (from_us, to_us) =
            (chosen.first().map_or(0, |segment| segment.to_us), chosen.last().map_or(0, |last| last.to_us));
        Ok(Tokens { sequences: streams.into_values().map(|stream| stream.tokens).collect(), from_us, to_us })
    }
}

struct Stream {
    tokeniser: Box<dyn Tokeniser>,
    tokens: Vec<Token>,
}

fn access(record: &AccessRecord) -> Access {
    Access {
        at_us: record.at_us,
        // A tokeniser serves one stream.
        vm: 0,
        op: match record.op {
            AccessOp::Read => Op::Read,
            AccessOp::Write => Op::Write,
            AccessOp::Discard => Op::Discard,
        },
        first: record.page,
        pages: record.pages,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Accesses;

    /// The page itself is the token; writes are left out.
    struct Plain;

    impl Tokeniser for Plain {
        fn push(&mut self, access: &Access) -> Option<Token> {
            (access.op == Op::Read).then(|| token(access.first))
        }
    }

    fn token(page: u64) -> Token {
        Token::from_bits(page as u16).unwrap()
    }

    fn append(store: &Store, storage: &str, vm: &str, at_us: u64, pages: &[u64]) {
        let record = |(n, page): (usize, &u64)| AccessRecord {
            at_us: at_us + n as u64,
            op: if page % 10 == 9 { AccessOp::Write } else { AccessOp::Read },
            page: *page,
            pages: 1,
        };
        let accesses = Accesses {
            storage: storage.to_owned(),
            vm: vm.to_owned(),
            program: String::new(),
            records: pages.iter().enumerate().map(record).collect(),
        };
        store.append_accesses(accesses).wait().unwrap();
    }

    fn sequences(tokens: &Tokens) -> Vec<Vec<u64>> {
        tokens.sequences.iter().map(|sequence| sequence.iter().map(|token| u64::from(token.bits())).collect()).collect()
    }

    #[test]
    fn streams_come_in_time_order_latest_first_and_again_by_their_range() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("db")).unwrap();
        append(&store, "a", "v", 1000, &[1, 2, 9, 3]);
        append(&store, "a", "w", 1500, &[21, 22]);
        append(&store, "b", "v", 3000, &[11, 12]);
        append(&store, "a", "v", 2000, &[4, 5]);
        let source = HistoryTokens::new(&store, || Box::new(Plain)).unwrap();
        let never = || false;
        assert_eq!(source.accesses(&Scope::Global), Ok(10));
        assert_eq!(source.accesses(&Scope::Storage("b".into())), Ok(2));
        assert_eq!(source.accesses(&Scope::Storage("c".into())), Ok(0));
        let all = source.tokens(&Scope::Global, None, 100, &never).unwrap();
        assert_eq!(sequences(&all), [vec![1, 2, 3, 4, 5], vec![21, 22], vec![11, 12]]);
        assert_eq!(all.count(), 9);
        // The oldest does not fit any more.
        let some = source.tokens(&Scope::Global, None, 7, &never).unwrap();
        assert_eq!(sequences(&some), [vec![4, 5], vec![21, 22], vec![11, 12]]);
        append(&store, "a", "v", 4000, &[6]);
        let again = source.tokens(&Scope::Global, Some((some.from_us, some.to_us)), 7, &never).unwrap();
        assert_eq!(again, some);
        let one = source.tokens(&Scope::Storage("a".into()), None, 100, &never).unwrap();
        assert_eq!(sequences(&one), [vec![1, 2, 3, 4, 5, 6], vec![21, 22]]);
        assert_eq!(source.tokens(&Scope::Global, None, 100, &|| true).unwrap().count(), 0);
    }
}
