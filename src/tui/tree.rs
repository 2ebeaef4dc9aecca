//! The conversation as the screen knows it: turns by number, each with what it follows.

use crate::chat::Message;
use crate::chat::history::TurnState;
use std::collections::HashMap;

/// A turn, and what is known of it besides its text.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it follows.
    pub parent: Option<usize>,
    /// Who: `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
    /// How it ended.
    pub state: TurnState,
    /// What it took, for answers of this run.
    pub figures: Option<String>,
}

/// All turns of a conversation, of all branches.
#[derive(Default)]
pub struct Tree {
    /// In the order in which they began; a parent stands before its children.
    pub nodes: Vec<Node>,
    /// Where the conversation stands.
    pub head: Option<usize>,
}

impl Tree {
    /// Adds a turn and goes there.
    pub fn push(&mut self, parent: Option<usize>, role: &str, content: &str, state: TurnState) -> usize {
        self.nodes.push(Node { parent, role: role.into(), content: content.into(), state, figures: None });
        self.head = Some(self.nodes.len() - 1);
        self.nodes.len() - 1
    }

    /// The turns from the beginning to the head.
    pub fn path(&self) -> Vec<usize> {
        self.path_to(self.head)
    }

    /// The turns from the beginning to one of them.
    pub fn path_to(&self, leaf: Option<usize>) -> Vec<usize> {
        let mut path: Vec<usize> = std::iter::successors(leaf, |&i| self.nodes[i].parent).collect();
        path.reverse();
        path
    }

    /// The turns that follow the same one, this one included; oldest first.
    pub fn siblings(&self, i: usize) -> Vec<usize> {
        let n = &self.nodes[i];
        let same = |s: &Node| s.parent == n.parent && s.role == n.role;
        (0..self.nodes.len()).filter(|&s| same(&self.nodes[s])).collect()
    }

    /// The siblings of every turn, by what they follow and who speaks.
    pub fn branches(&self) -> HashMap<(Option<usize>, &str), Vec<usize>> {
        let mut out: HashMap<_, Vec<usize>> = HashMap::with_capacity(self.nodes.len());
        for (i, n) in self.nodes.iter().enumerate() {
            out.entry((n.parent, n.role.as_str())).or_default().push(i);
        }
        out
    }

    /// The end of the branch that was last begun below a turn.
    pub fn leaf(&self, mut i: usize) -> usize {
        while let Some(child) = (i + 1..self.nodes.len()).rev().find(|&c| self.nodes[c].parent == Some(i)) {
            i = child;
        }
        i
    }

    /// What was said in the turns up to one of them.
    pub fn turns(&self, leaf: Option<usize>) -> Vec<Message> {
        let path = self.path_to(leaf).into_iter();
        path.map(|i| Message::new(&self.nodes[i].role, &self.nodes[i].content)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_are_kept_and_found() {
        let mut t = Tree::default();
        let whole = TurnState::Whole;
        let s = t.push(None, "system", "be brief", whole);
        let q = t.push(Some(s), "user", "q", whole);
        let a1 = t.push(Some(q), "assistant", "a1", whole);
        let a2 = t.push(Some(q), "assistant", "a2", whole);
        let s2 = t.push(Some(a2), "system", "be long", whole);
        let q2 = t.push(Some(s2), "user", "q2", whole);
        assert_eq!(t.path(), [s, q, a2, s2, q2]);
        assert_eq!(t.siblings(a1), [a1, a2]);
        assert_eq!((t.leaf(q), t.leaf(a1)), (q2, a1));
        let said = |leaf| t.turns(Some(leaf)).iter().map(|m| m.content.clone()).collect::<Vec<_>>();
        assert_eq!(said(q2), ["be brief", "q", "a2", "be long", "q2"]);
        assert_eq!(said(a1), ["be brief", "q", "a1"]);
    }
}
