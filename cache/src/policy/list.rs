//! Doubly linked lists threaded through slot numbers: the queues of the eviction policy and the free slots, without
//! allocation.

/// End of a list.
pub(crate) const NIL: u32 = u32::MAX;

/// A slot's neighbours. A slot is in one list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    prev: u32,
    next: u32,
}

impl Link {
    /// Of a slot that is in no list and in no use.
    pub(crate) const WITHDRAWN: Link = Link { prev: NIL - 1, next: NIL - 1 };

    pub(crate) fn is_withdrawn(self) -> bool {
        self.prev == Link::WITHDRAWN.prev
    }
}

impl Default for Link {
    fn default() -> Link {
        Link { prev: NIL, next: NIL }
    }
}

/// One queue: new slots at the head, victims from the tail.
#[derive(Clone, Copy, Debug)]
pub(crate) struct List {
    head: u32,
    tail: u32,
    len: u32,
}

impl Default for List {
    fn default() -> List {
        List { head: NIL, tail: NIL, len: 0 }
    }
}

impl List {
    pub(crate) fn len(&self) -> u32 {
        self.len
    }
    pub(crate) fn head(&self) -> Option<u32> {
        (self.head != NIL).then_some(self.head)
    }
    pub(crate) fn tail(&self) -> Option<u32> {
        (self.tail != NIL).then_some(self.tail)
    }
    /// The neighbour of `slot` towards the head.
    pub(crate) fn towards_head(links: &[Link], slot: u32) -> Option<u32> {
        let prev = links[slot as usize].prev;
        (prev != NIL).then_some(prev)
    }
    /// The neighbour of `slot` towards the tail.
    pub(crate) fn towards_tail(links: &[Link], slot: u32) -> Option<u32> {
        let next = links[slot as usize].next;
        (next != NIL).then_some(next)
    }
    pub(crate) fn push_head(&mut self, links: &mut [Link], slot: u32) {
        links[slot as usize] = Link { prev: NIL, next: self.head };
        match self.head {
            NIL => self.tail = slot,
            head => links[head as usize].prev = slot,
        }
        self.head = slot;
        self.len += 1;
    }
    /// Puts `to`, which is in no list, in the place of `slot`.
    pub(crate) fn replace(&mut self, links: &mut [Link], slot: u32, to: u32) {
        let Link { prev, next } = links[slot as usize];
        match prev {
            NIL => self.head = to,
            prev => links[prev as usize].next = to,
        }
        match next {
            NIL => self.tail = to,
            next => links[next as usize].prev = to,
        }
        links[to as usize] = Link { prev, next };
        links[slot as usize] = Link::default();
    }
    pub(crate) fn remove(&mut self, links: &mut [Link], slot: u32) {
        let Link { prev, next } = links[slot as usize];
        match prev {
            NIL => self.head = next,
            prev => links[prev as usize].next = next,
        }
        match next {
            NIL => self.tail = prev,
            next => links[next as usize].prev = prev,
        }
        links[slot as usize] = Link::default();
        self.len -= 1;
    }
}
