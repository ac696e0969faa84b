// Package reconcile decides what follows from what users ask for and what nodes
// are: where sessions are placed, when they are lost, what is removed. Plan
// decides and does nothing; Reconciler does what Plan says.
package reconcile

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// Snapshot is what Plan looks at, and does not change.
type Snapshot struct {
	Sessions []*fleet.Session
	Nodes    []*fleet.Node
}

// Action is one change of one session. It holds for the session's Revision only.
type Action struct {
	Kind     Kind
	Session  string
	UID      string
	Revision uint64

	Node    string      // Place: where to
	State   fleet.State // all but Remove: the state after it
	Reason  string
	Message string
}

// Kind of an action.
type Kind string

// Kinds of actions. The session gets State, Reason and Message of the action
// with each but Remove.
const (
	// Place makes the session's next assignment, on Node.
	Place Kind = "place"
	// Reassign makes the next assignment on the same node, with the newest spec.
	Reassign Kind = "reassign"
	// AskDelete tells the node to remove the session.
	AskDelete Kind = "ask-delete"
	// AskSuspend tells the node to save the session and to stop it.
	AskSuspend Kind = "ask-suspend"
	// SetState changes nothing else.
	SetState Kind = "set-state"
	// Remove deletes the session's record.
	Remove Kind = "remove"
)

// Plan returns what is to be done now: at most one action per session, in the
// order of ids. After all of it was applied, Plan returns nothing. The same
// input gives the same plan, in whatever order it comes. The time is for decisions
// that wait for one; there is none yet.
func Plan(snap Snapshot, _ time.Time) []Action {
	nodes := make(map[string]*fleet.Node, len(snap.Nodes))
	for _, n := range snap.Nodes {
		nodes[n.ID] = n
	}
	var actions []Action
	var pending []*fleet.Session
	count := make(map[string]int, len(nodes)) // sessions per node
	for _, s := range snap.Sessions {
		if s.Assignment != nil {
			count[s.Assignment.Node]++
		}
		if s.Assignment == nil && !s.Deleting && !s.Suspended {
			pending = append(pending, s)
			continue
		}
		if a, ok := settle(s, nodes); ok {
			actions = append(actions, a)
		}
	}
	actions = append(actions, place(pending, snap.Nodes, count)...)
	slices.SortFunc(actions, func(a, b Action) int { return cmp.Compare(a.Session, b.Session) })
	return actions
}

func action(k Kind, s *fleet.Session, state fleet.State, reason, message string) Action {
	return Action{
		Kind: k, Session: s.ID, UID: s.UID, Revision: s.Revision,
		State: state, Reason: reason, Message: message,
	}
}

// settle decides for a session that is on a node, or is to be on none.
func settle(s *fleet.Session, nodes map[string]*fleet.Node) (Action, bool) {
	a := s.Assignment
	if a == nil {
		return settleUnplaced(s)
	}
	node := nodes[a.Node]
	ready := node != nil && node.State == fleet.NodeReady

	if s.Deleting {
		reason, message := "", ""
		if !ready {
			reason = fleet.ReasonNodeUnreachable
			message = fmt.Sprintf("Node %s cannot be reached%s. The session and its workspace are removed when it returns.", a.Node, since(node))
			if s.Spec.Storage.Remote() {
				message += " Delete the session once more to give up what is only there."
			}
		}
		if !a.Delete {
			return action(AskDelete, s, fleet.StateDeleting, reason, message), true
		}
		// Only what is ours: a node may report reasons of its own.
		ours := s.Reason == fleet.ReasonNodeUnreachable
		if s.State != fleet.StateDeleting || (!ready && !ours) || (ready && ours) {
			return action(SetState, s, fleet.StateDeleting, reason, message), true
		}
		return Action{}, false
	}

	// What is to be run anew after this waits until it is resumed.
	if s.Suspended {
		return settleSuspended(s, node, ready)
	}

	// A new spec reaches the node with the next generation, and so does what ends a
	// suspension: whatever the node still says of that is then old. If the node is
	// away it waits there.
	restore := s.AwaitsRestore()
	if !s.Spec.SameRun(a.Spec) || a.Suspend || restore {
		switch {
		case !ready:
			return action(Reassign, s, fleet.StateLost, fleet.ReasonNodeUnreachable, lost(s, node)), true
		case a.Suspend:
			return action(Reassign, s, fleet.StateStarting, "", "It is being resumed."), true
		case restore:
			return action(Reassign, s, fleet.StateStarting, "", fmt.Sprintf("It is being taken back to checkpoint %s.", s.RestoreCheckpoint)), true
		case s.Spec.SameContainer(a.Spec) && s.State == fleet.StateRunning:
			// New limits do not interrupt it.
			return action(Reassign, s, s.State, s.Reason, s.Message), true
		default:
			return action(Reassign, s, fleet.StateStarting, "", "The new configuration is being applied."), true
		}
	}

	switch {
	case !ready && s.State != fleet.StateLost:
		return action(SetState, s, fleet.StateLost, fleet.ReasonNodeUnreachable, lost(s, node)), true
	case ready && s.State == fleet.StateLost:
		// The node reports next, and what it reports counts. Until then nothing is
		// known but that the session is no longer lost. This cannot go back and forth:
		// one direction needs the node ready, the other needs it not to be.
		return action(SetState, s, fleet.StateStarting, fleet.ReasonNodeReturned, returned(a.Node)), true
	}
	return Action{}, false
}

// settleUnplaced decides for a session that is on no node and is being deleted or
// suspended.
func settleUnplaced(s *fleet.Session) (Action, bool) {
	switch {
	case s.AwaitsStorage() && s.Purge && s.Reason == "":
		return action(SetState, s, fleet.StateDeleting, fleet.ReasonPurging, "Its folder and its checkpoints are being deleted from the object storage."), true
	case s.AwaitsStorage(): // its record says where that is
		return Action{}, false
	case s.Deleting:
		return action(Remove, s, "", "", ""), true
	case s.State != fleet.StateSuspended:
		return action(SetState, s, fleet.StateSuspended, "", ""), true
	}
	return Action{}, false
}

// settleSuspended decides for a session that is on a node and is to be suspended.
func settleSuspended(s *fleet.Session, node *fleet.Node, ready bool) (Action, bool) {
	a := s.Assignment
	switch {
	case !a.Suspend && !ready:
		return action(AskSuspend, s, fleet.StateLost, fleet.ReasonNodeUnreachable, lost(s, node)), true
	case !a.Suspend:
		return action(AskSuspend, s, fleet.StateSuspending, "", "It is being saved, and then stopped."), true
	case s.State == fleet.StateSuspended: // nothing runs that could be lost
		return Action{}, false
	case !ready && s.State != fleet.StateLost:
		return action(SetState, s, fleet.StateLost, fleet.ReasonNodeUnreachable, lost(s, node)), true
	case ready && s.State == fleet.StateLost:
		return action(SetState, s, fleet.StateSuspending, fleet.ReasonNodeReturned, returned(a.Node)), true
	}
	return Action{}, false
}

func returned(node string) string {
	return fmt.Sprintf("Node %s is back; waiting for what it says of the session.", node)
}

func lost(s *fleet.Session, n *fleet.Node) string {
	id := s.Assignment.Node
	if s.Spec.Storage.Remote() {
		return fmt.Sprintf("Node %s cannot be reached%s. The session goes on when the node returns. If that is gone or cut off for good, `cloudcode session resume %s` starts it on another node from what is in its object storage.", id, since(n), s.ID)
	}
	return fmt.Sprintf("Node %s cannot be reached%s, and the session's workspace is only there. The session goes on when the node returns: check the machine, its network, and that `cloudcode nodeagent` runs on it.", id, since(n))
}

func since(n *fleet.Node) string {
	if n == nil || n.HeartbeatTime.IsZero() {
		return ""
	}
	return " since " + n.HeartbeatTime.UTC().Format(time.RFC3339)
}
