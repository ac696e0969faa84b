package reconcile

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
	"github.com/cloudcode-dev/cloudcode/server/store/boltstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func ready(id string, labels ...string) *fleet.Node {
	n := &fleet.Node{ID: id, State: fleet.NodeReady, Labels: map[string]string{}}
	for i := 0; i < len(labels); i += 2 {
		n.Labels[labels[i]] = labels[i+1]
	}
	return n
}

func away(id string) *fleet.Node { return &fleet.Node{ID: id, State: fleet.NodeNotReady} }

func pending(id string) *fleet.Session {
	return &fleet.Session{ID: id, UID: "u-" + id, State: fleet.StatePending, Revision: 1}
}

func placed(id, node string, state fleet.State) *fleet.Session {
	s := pending(id)
	s.State, s.Generation = state, 1
	s.Assignment = &fleet.Assignment{Node: node, Generation: 1, Password: "p"}
	return s
}

func with(s *fleet.Session, change func(*fleet.Session)) *fleet.Session { change(s); return s }

// TestDecisions shows each decision once: `kind session node state reason`.
func TestDecisions(t *testing.T) {
	deleting := func(s *fleet.Session) { s.Deleting, s.State = true, fleet.StateDeleting }
	asked := func(s *fleet.Session) { deleting(s); s.Assignment.Delete = true }
	image := func(s *fleet.Session) { s.Spec.Image = "new" }
	limits := func(s *fleet.Session) { s.Spec.Resources.CPUMillis = 500 }
	zone := func(s *fleet.Session) { s.Spec.NodeSelector = map[string]string{"zone": "b"} }
	big := func(s *fleet.Session) { s.Spec.Resources.MemoryBytes = 8 << 30 }
	remote := func(s *fleet.Session) {
		s.Spec.Storage.Mode = fleet.ModeSnapshot
		if s.Assignment != nil {
			s.Assignment.Spec = s.Spec.Clone()
		}
	}
	deletingRemote := func(s *fleet.Session) { remote(s); deleting(s) }
	suspend := func(s *fleet.Session) { s.Suspended, s.State = true, fleet.StateSuspending }
	suspending := func(s *fleet.Session) { suspend(s); s.Assignment.Suspend = true }
	suspended := func(s *fleet.Session) { suspending(s); s.State = fleet.StateSuspended }
	resumed := func(s *fleet.Session) { suspended(s); s.Suspended, s.State = false, fleet.StateStarting }
	restore := func(s *fleet.Session) { s.RestoreCheckpoint = "c1" }
	small := ready("n1")
	small.Info.MemoryBytes = 4 << 30
	for name, c := range map[string]struct {
		session *fleet.Session
		nodes   []*fleet.Node
		want    string // empty: nothing to do
		says    []string
	}{
		"place":                    {pending("a"), []*fleet.Node{ready("n1")}, "place n1 STARTING ", nil},
		"no nodes":                 {pending("a"), nil, "set-state  PENDING NO_NODES", []string{"cloudcode nodeagent"}},
		"no ready node":            {pending("a"), []*fleet.Node{away("n1"), away("n2")}, "set-state  PENDING NO_READY_NODE", []string{"nodes n1, n2 have"}},
		"no matching node":         {with(pending("a"), zone), []*fleet.Node{ready("n1", "zone", "a")}, "set-state  PENDING NO_MATCHING_NODE", []string{"zone=b", "n1", "node_selector"}},
		"matching one away":        {with(pending("a"), zone), []*fleet.Node{ready("n1"), away("n2")}, "set-state  PENDING NO_MATCHING_NODE", []string{"Not ready: node n2"}},
		"too small":                {with(pending("a"), big), []*fleet.Node{small}, "set-state  PENDING NODE_TOO_SMALL", []string{"8.0 GiB of memory", "node n1 has"}},
		"size unknown":             {with(pending("a"), big), []*fleet.Node{ready("n1")}, "place n1 STARTING ", nil},
		"matching":                 {with(pending("a"), zone), []*fleet.Node{ready("n1"), ready("n2", "zone", "b")}, "place n2 STARTING ", nil},
		"runs":                     {placed("a", "n1", fleet.StateRunning), []*fleet.Node{ready("n1")}, "", nil},
		"failed stays":             {placed("a", "n1", fleet.StateFailed), []*fleet.Node{ready("n1"), ready("n2")}, "", nil},
		"node away":                {placed("a", "n1", fleet.StateRunning), []*fleet.Node{away("n1"), ready("n2")}, "set-state  LOST NODE_UNREACHABLE", []string{"n1", "goes on when the node returns"}},
		"node unknown":             {placed("a", "n1", fleet.StateRunning), nil, "set-state  LOST NODE_UNREACHABLE", nil},
		"lost stays":               {placed("a", "n1", fleet.StateLost), []*fleet.Node{away("n1")}, "", nil},
		"node returns":             {placed("a", "n1", fleet.StateLost), []*fleet.Node{ready("n1")}, "set-state  STARTING NODE_RETURNED", nil},
		"delete pending":           {with(pending("a"), deleting), nil, "remove   ", nil},
		"delete":                   {with(placed("a", "n1", fleet.StateRunning), deleting), []*fleet.Node{ready("n1")}, "ask-delete  DELETING ", nil},
		"delete, node away":        {with(placed("a", "n1", fleet.StateRunning), deleting), []*fleet.Node{away("n1")}, "ask-delete  DELETING NODE_UNREACHABLE", []string{"removed when it returns"}},
		"delete asked":             {with(placed("a", "n1", fleet.StateRunning), asked), []*fleet.Node{ready("n1")}, "", nil},
		"delete asked, node away":  {with(placed("a", "n1", fleet.StateRunning), asked), []*fleet.Node{away("n1")}, "set-state  DELETING NODE_UNREACHABLE", nil},
		"new image":                {with(placed("a", "n1", fleet.StateRunning), image), []*fleet.Node{ready("n1"), ready("n2")}, "reassign  STARTING ", nil},
		"new image, node away":     {with(placed("a", "n1", fleet.StateLost), image), []*fleet.Node{away("n1")}, "reassign  LOST NODE_UNREACHABLE", nil},
		"new limits":               {with(placed("a", "n1", fleet.StateRunning), limits), []*fleet.Node{ready("n1")}, "reassign  RUNNING ", nil},
		"new limits while failed":  {with(placed("a", "n1", fleet.StateFailed), limits), []*fleet.Node{ready("n1")}, "reassign  STARTING ", nil},
		"new selector of a placed": {with(placed("a", "n1", fleet.StateRunning), zone), []*fleet.Node{ready("n1")}, "", nil},

		"suspend":                     {with(placed("a", "n1", fleet.StateRunning), suspend), []*fleet.Node{ready("n1")}, "ask-suspend  SUSPENDING ", nil},
		"suspend, node away":          {with(placed("a", "n1", fleet.StateRunning), suspend), []*fleet.Node{away("n1")}, "ask-suspend  LOST NODE_UNREACHABLE", nil},
		"suspend asked":               {with(placed("a", "n1", fleet.StateRunning), suspending), []*fleet.Node{ready("n1")}, "", nil},
		"suspend asked, node away":    {with(placed("a", "n1", fleet.StateRunning), suspending), []*fleet.Node{away("n1")}, "set-state  LOST NODE_UNREACHABLE", nil},
		"suspend asked, node back":    {with(with(placed("a", "n1", fleet.StateRunning), suspending), func(s *fleet.Session) { s.State = fleet.StateLost }), []*fleet.Node{ready("n1")}, "set-state  SUSPENDING NODE_RETURNED", nil},
		"suspended":                   {with(placed("a", "n1", fleet.StateRunning), suspended), []*fleet.Node{ready("n1")}, "", nil},
		"suspended, node away":        {with(placed("a", "n1", fleet.StateRunning), suspended), nil, "", nil},
		"suspended, new image":        {with(with(placed("a", "n1", fleet.StateRunning), suspended), image), []*fleet.Node{ready("n1")}, "", nil},
		"suspended, on no node":       {with(pending("a"), func(s *fleet.Session) { s.Suspended, s.State = true, fleet.StateSuspended }), []*fleet.Node{ready("n1")}, "", nil},
		"suspended before a node":     {with(pending("a"), func(s *fleet.Session) { s.Suspended = true }), []*fleet.Node{ready("n1")}, "set-state  SUSPENDED ", nil},
		"resume on its node":          {with(placed("a", "n1", fleet.StateRunning), resumed), []*fleet.Node{ready("n1"), ready("n2")}, "reassign  STARTING ", nil},
		"resume, node away":           {with(placed("a", "n1", fleet.StateRunning), resumed), []*fleet.Node{away("n1"), ready("n2")}, "reassign  LOST NODE_UNREACHABLE", nil},
		"resume anywhere":             {with(pending("a"), func(s *fleet.Session) { s.Generation = 7; remote(s) }), []*fleet.Node{away("n1"), ready("n2")}, "place n2 STARTING ", nil},
		"in object storage, lost":     {with(placed("a", "n1", fleet.StateRunning), remote), []*fleet.Node{away("n1"), ready("n2")}, "set-state  LOST NODE_UNREACHABLE", []string{"session resume a"}},
		"restore":                     {with(placed("a", "n1", fleet.StateRunning), restore), []*fleet.Node{ready("n1")}, "reassign  STARTING ", []string{"c1"}},
		"restoring":                   {with(with(placed("a", "n1", fleet.StateStarting), restore), func(s *fleet.Session) { s.Assignment.RestoreCheckpoint = "c1" }), []*fleet.Node{ready("n1")}, "", nil},
		"delete remote, node away":    {with(with(placed("a", "n1", fleet.StateRunning), remote), deleting), []*fleet.Node{away("n1")}, "ask-delete  DELETING NODE_UNREACHABLE", []string{"once more"}},
		"delete suspended":            {with(placed("a", "n1", fleet.StateRunning), func(s *fleet.Session) { suspended(s); deleting(s) }), []*fleet.Node{ready("n1")}, "ask-delete  DELETING ", nil},
		"delete, storage not told":    {with(pending("a"), deletingRemote), nil, "", nil},
		"delete, to be purged":        {with(pending("a"), func(s *fleet.Session) { deletingRemote(s); s.Purge = true }), nil, "set-state  DELETING STORAGE_PURGING", nil},
		"delete, cannot be purged":    {with(pending("a"), func(s *fleet.Session) { deletingRemote(s); s.Purge, s.Reason = true, "STORAGE_DENIED" }), nil, "", nil},
		"delete, storage was settled": {with(pending("a"), func(s *fleet.Session) { deletingRemote(s); s.StorageSettled = true }), nil, "remove   ", nil},
	} {
		t.Run(name, func(t *testing.T) {
			actions := Plan(Snapshot{Sessions: []*fleet.Session{c.session}, Nodes: c.nodes}, time.Now())
			got, message := "", ""
			for _, a := range actions {
				got += fmt.Sprintf("%s %s %s %s", a.Kind, a.Node, a.State, a.Reason)
				message = a.Message
			}
			if got != c.want {
				t.Fatalf("got %q, want %q", got, c.want)
			}
			for _, text := range c.says {
				if !strings.Contains(message, text) {
					t.Errorf("message %q does not say %q", message, text)
				}
			}
		})
	}
}

func TestSpread(t *testing.T) {
	snap := Snapshot{Nodes: []*fleet.Node{ready("n3"), ready("n1", "zone", "a"), ready("n2")}}
	snap.Sessions = append(snap.Sessions, placed("old1", "n1", fleet.StateRunning), placed("old2", "n2", fleet.StateRunning))
	for i := range 7 {
		s := pending(fmt.Sprintf("s%d", i))
		if i%2 == 1 {
			s.Spec.NodeSelector = map[string]string{"zone": "a"}
		}
		snap.Sessions = append(snap.Sessions, s)
	}
	count := map[string]int{"n1": 1, "n2": 1}
	for _, a := range Plan(snap, time.Now()) {
		count[a.Node]++
	}
	if d := cmp.Diff(map[string]int{"n1": 4, "n2": 3, "n3": 2}, count); d != "" && cmp.Diff(map[string]int{"n1": 4, "n2": 2, "n3": 3}, count) != "" {
		t.Error(d)
	}
}

// fleetMachine drives a store as users and nodes do, and checks after each step
// what must always hold.
type fleetMachine struct {
	store store.Store
	r     *Reconciler
	seen  map[string]*fleet.Session // by UID, as of the last check
	next  int

	gaveUp string // session that users asked something of since the last check
}

func (m *fleetMachine) update(t *rapid.T, fn func(tx store.Tx) error) {
	if _, err := m.store.Update(t.Context(), fn); err != nil {
		t.Fatal(err)
	}
}

func (m *fleetMachine) snapshot(t *rapid.T) (snap Snapshot) {
	c := newCache()
	if err := c.load(t.Context(), m.store); err != nil {
		t.Fatal(err)
	}
	snap, _ = c.snapshot()
	return snap
}

func drawSpec(t *rapid.T) fleet.Spec {
	spec := fleet.Spec{Image: rapid.SampledFrom([]string{"i1", "i2"}).Draw(t, "image")}
	if rapid.Bool().Draw(t, "select") {
		spec.NodeSelector = map[string]string{"zone": rapid.SampledFrom([]string{"a", "b"}).Draw(t, "zone")}
	}
	spec.Resources.CPUMillis = rapid.SampledFrom([]int64{0, 1000, 4000, 16000}).Draw(t, "cpu")
	return spec
}

// drawStorage is for a create: it never changes.
func drawStorage(t *rapid.T) fleet.Storage {
	return fleet.Storage{Mode: rapid.SampledFrom([]fleet.StorageMode{"", fleet.ModeLocal, fleet.ModeSnapshot, fleet.ModeMount}).Draw(t, "mode")}
}

func (m *fleetMachine) pick(t *rapid.T) *fleet.Session {
	all := m.snapshot(t).Sessions
	if len(all) == 0 {
		t.Skip("no session")
	}
	byID := map[string]*fleet.Session{}
	var ids []string
	for _, s := range all {
		byID[s.ID] = s
		ids = append(ids, s.ID)
	}
	return byID[rapid.SampledFrom(sorted(ids)).Draw(t, "session")]
}

func (m *fleetMachine) Create(t *rapid.T) {
	m.next++
	s := pending(fmt.Sprintf("s%d", m.next))
	s.Spec = drawSpec(t)
	s.Spec.Storage = drawStorage(t)
	m.update(t, func(tx store.Tx) error { return tx.PutSession(s) })
}

func (m *fleetMachine) Node(t *rapid.T) {
	n := ready(rapid.SampledFrom([]string{"n1", "n2", "n3", "n4"}).Draw(t, "node"))
	if rapid.Bool().Draw(t, "away") {
		n.State = fleet.NodeNotReady
	}
	if zone := rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "zone"); zone != "" {
		n.Labels["zone"] = zone
	}
	n.Info.CPUMillis = rapid.SampledFrom([]int64{0, 2000, 8000}).Draw(t, "cpus")
	m.update(t, func(tx store.Tx) error { return tx.PutNode(n) })
}

func (m *fleetMachine) Delete(t *rapid.T) {
	s := m.pick(t)
	s.Deleting, s.Purge = true, rapid.Bool().Draw(t, "purge")
	if err := s.SetState(fleet.StateDeleting, "", ""); err != nil {
		t.Fatal(err)
	}
	m.update(t, func(tx store.Tx) error { return tx.PutSession(s) })
}

// ask is what the API does; what it refuses changes nothing.
func (m *fleetMachine) ask(t *rapid.T, fn func(*fleet.Session, time.Time) error) {
	s := m.pick(t)
	if err := fn(s, time.Now()); err != nil {
		t.Skip(err.Error())
	}
	m.gaveUp = s.ID
	m.update(t, func(tx store.Tx) error { return tx.PutSession(s) })
}

func (m *fleetMachine) Suspend(t *rapid.T) { m.ask(t, (*fleet.Session).Suspend) }
func (m *fleetMachine) Resume(t *rapid.T)  { m.ask(t, (*fleet.Session).Resume) }

func (m *fleetMachine) Restore(t *rapid.T) {
	s := m.pick(t)
	if s.Deleting || !s.Spec.Storage.Remote() {
		t.Skip("the API refuses that")
	}
	if err := s.Restore(rapid.SampledFrom([]string{"c1", "c2"}).Draw(t, "checkpoint"), time.Now()); err != nil {
		t.Skip(err.Error())
	}
	m.gaveUp = s.ID
	m.update(t, func(tx store.Tx) error { return tx.PutSession(s) })
}

// GiveUp is what deleting once more does.
func (m *fleetMachine) GiveUp(t *rapid.T) {
	s := m.pick(t)
	if !s.GiveUp(time.Now()) {
		t.Skip("there is nothing to give up")
	}
	m.update(t, func(tx store.Tx) error { return tx.PutSession(s) })
}

// Settle is what the server does with the object storage of deleted sessions.
func (m *fleetMachine) Settle(t *rapid.T) {
	s := m.pick(t)
	if !s.AwaitsStorage() {
		t.Skip("nothing to do")
	}
	s.StorageSettled = true
	m.update(t, func(tx store.Tx) error { return tx.PutSession(s) })
}

func (m *fleetMachine) Change(t *rapid.T) {
	s := m.pick(t)
	if s.Deleting {
		t.Skip("the API refuses that")
	}
	storage := s.Spec.Storage
	s.Spec = drawSpec(t)
	s.Spec.Storage = storage
	m.update(t, func(tx store.Tx) error { return tx.PutSession(s) })
}

// Report is what a ready node says of its session.
func (m *fleetMachine) Report(t *rapid.T) {
	s := m.pick(t)
	m.update(t, func(tx store.Tx) error {
		if s.Assignment == nil {
			return nil
		}
		if n, err := tx.Node(s.Assignment.Node); err != nil || n.State != fleet.NodeReady {
			return err
		}
		states := []fleet.ReportedState{fleet.ReportedStarting, fleet.ReportedRunning, fleet.ReportedFailed}
		switch a := s.Assignment; {
		case a.Delete:
			states = []fleet.ReportedState{fleet.ReportedGone}
		case a.Suspend:
			states = append(states, fleet.ReportedSuspending, fleet.ReportedSuspended)
		}
		r := fleet.Report{
			SessionID: s.ID, SessionUID: s.UID, Generation: s.Assignment.Generation,
			State: rapid.SampledFrom(states).Draw(t, "state"),
		}
		if _, err := s.ApplyReport(r, s.Assignment.Node, time.Now()); err != nil {
			return err
		}
		return tx.PutSession(s)
	})
}

func (m *fleetMachine) Check(t *rapid.T) {
	before := m.snapshot(t)
	nodes := map[string]*fleet.Node{}
	for _, n := range before.Nodes {
		nodes[n.ID] = n
	}
	actions := Plan(before, time.Now())
	shuffled := Snapshot{Sessions: append([]*fleet.Session(nil), before.Sessions...), Nodes: append([]*fleet.Node(nil), before.Nodes...)}
	rand.Shuffle(len(shuffled.Sessions), func(i, j int) {
		shuffled.Sessions[i], shuffled.Sessions[j] = shuffled.Sessions[j], shuffled.Sessions[i]
	})
	rand.Shuffle(len(shuffled.Nodes), func(i, j int) { shuffled.Nodes[i], shuffled.Nodes[j] = shuffled.Nodes[j], shuffled.Nodes[i] })
	if d := cmp.Diff(actions, Plan(shuffled, time.Now())); d != "" {
		t.Fatalf("the plan depends on the order of its input: %s", d)
	}
	once := map[string]bool{}
	for _, a := range actions {
		if once[a.Session] {
			t.Fatalf("two actions for %s", a.Session)
		}
		once[a.Session] = true
		rev, err := m.r.Apply(t.Context(), a)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.r.Apply(t.Context(), a); err == nil {
			t.Fatalf("%+v was applied twice, at revision %d", a, rev)
		}
	}
	after := m.snapshot(t)
	if again := Plan(after, time.Now()); len(again) > 0 {
		t.Fatalf("after a plan was applied there is still something to do: %+v", again)
	}

	now := map[string]*fleet.Session{}
	for _, s := range after.Sessions {
		now[s.UID] = s
		old := m.seen[s.UID]
		if s.Assignment == nil {
			switch {
			case s.Deleting && !s.AwaitsStorage():
				t.Fatalf("%s is deleted, on no node, and still there", s.ID)
			case s.Deleting && (s.Purge && s.Reason == "" || s.State != fleet.StateDeleting):
				t.Fatalf("%s is %s for %q", s.ID, s.State, s.Reason)
			case s.Deleting:
			case s.Suspended != (s.State == fleet.StateSuspended):
				t.Fatalf("%s is on no node, and %s; suspension is asked for: %v", s.ID, s.State, s.Suspended)
			case !s.Suspended && (s.State != fleet.StatePending || s.Reason == "" || s.Message == ""):
				t.Fatalf("%s is not placed, and %s for %q: %q", s.ID, s.State, s.Reason, s.Message)
			}
		} else {
			a, n := s.Assignment, nodes[s.Assignment.Node]
			isReady := n != nil && n.State == fleet.NodeReady
			switch {
			case a.Generation != s.Generation || a.Password == "":
				t.Fatalf("%s: generation %d, assignment %+v", s.ID, s.Generation, a)
			case s.Deleting != a.Delete || s.Deleting != (s.State == fleet.StateDeleting):
				t.Fatalf("%s: deleting %v, asked %v, state %s", s.ID, s.Deleting, a.Delete, s.State)
			case !s.Deleting && s.Suspended != a.Suspend:
				t.Fatalf("%s: suspension is asked for: %v, its node was told: %v", s.ID, s.Suspended, a.Suspend)
			case !s.Deleting && s.State != fleet.StateSuspended && isReady == (s.State == fleet.StateLost):
				t.Fatalf("%s is %s, its node's readiness is %v", s.ID, s.State, isReady)
			case !s.Deleting && s.Suspended && s.State != fleet.StateSuspending && s.State != fleet.StateSuspended && s.State != fleet.StateLost,
				!s.Deleting && !s.Suspended && (s.State == fleet.StateSuspending || s.State == fleet.StateSuspended):
				t.Fatalf("%s is %s; suspension is asked for: %v", s.ID, s.State, s.Suspended)
			case !s.Deleting && s.State == fleet.StateSuspended && s.Spec.Storage.Remote():
				t.Fatalf("%s is suspended in object storage, and still on %s", s.ID, a.Node)
			case !s.Deleting && !s.Suspended && (!a.Spec.SameRun(s.Spec) || a.RestoreCheckpoint != s.RestoreCheckpoint || a.RestoreGeneration != s.RestoreGeneration):
				t.Fatalf("%s does not run what was asked for", s.ID)
			case !s.Deleting && (old == nil || old.Assignment == nil) && (!isReady || !matches(n, s.Spec.NodeSelector) || !fits(n, s.Spec.Resources)):
				t.Fatalf("%s was placed on %+v", s.ID, n)
			}
		}
		if old == nil {
			continue
		}
		if s.Generation < old.Generation || (old.Deleting && !s.Deleting) {
			t.Fatalf("%s went back: %+v, %+v", s.ID, old, s)
		}
		moved := old.Assignment != nil && (s.Assignment == nil || s.Assignment.Node != old.Assignment.Node || s.Assignment.Password != old.Assignment.Password)
		// It may leave its node when it is deleted there, or, in object storage, when
		// it is suspended or a user has given up its node.
		left := s.Deleting || s.Spec.Storage.Remote() && (s.Suspended || old.Suspended || m.gaveUp == s.ID)
		if moved && !left {
			t.Fatalf("%s moved: %+v, %+v", s.ID, old.Assignment, s.Assignment)
		}
		if s.Assignment != nil && (s.Generation == old.Generation) != cmp.Equal(withoutWishes(s.Assignment), withoutWishes(old.Assignment)) {
			t.Fatalf("%s: generation %d and %d for %+v and %+v", s.ID, old.Generation, s.Generation, old.Assignment, s.Assignment)
		}
	}
	m.seen, m.gaveUp = now, ""
}

// withoutWishes is what changes with the generation only.
func withoutWishes(a *fleet.Assignment) *fleet.Assignment {
	if a == nil {
		return nil
	}
	c := *a
	c.Delete, c.Suspend, c.RestoreCheckpoint, c.RestoreGeneration = false, false, "", 0
	return &c
}

func sorted(ids []string) []string {
	for i := range ids {
		for j := i; j > 0 && ids[j] < ids[j-1]; j-- {
			ids[j], ids[j-1] = ids[j-1], ids[j]
		}
	}
	return ids
}

func TestPlanProperties(t *testing.T) {
	// In memory where there is such a folder: thousands of commits, and nothing here
	// is about the disk.
	dir, err := os.MkdirTemp("/dev/shm", "reconcile")
	if err != nil {
		dir = t.TempDir()
	}
	defer os.RemoveAll(dir)
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		s, err := boltstore.Open(filepath.Join(dir, fmt.Sprint(n)))
		if err != nil {
			rt.Fatal(err)
		}
		defer s.Close()
		m := &fleetMachine{store: s, r: New(s, slog.New(slog.DiscardHandler)), seen: map[string]*fleet.Session{}}
		rt.Repeat(map[string]func(*rapid.T){
			"create": m.Create, "node": m.Node, "delete": m.Delete, "change": m.Change, "report": m.Report,
			"suspend": m.Suspend, "resume": m.Resume, "restore": m.Restore, "settle": m.Settle, "giveUp": m.GiveUp, "": m.Check,
		})
	})
}

func large(n int) Snapshot {
	var snap Snapshot
	for i := range n {
		node := ready(fmt.Sprintf("n%05d", i), "zone", fmt.Sprint(i%100))
		node.Info = fleet.NodeInfo{CPUMillis: 8000, MemoryBytes: 32 << 30}
		snap.Nodes = append(snap.Nodes, node)
		s := pending(fmt.Sprintf("s%05d", i))
		s.Spec.Resources.MemoryBytes = 1 << 30
		if i%2 == 0 {
			s.Spec.NodeSelector = map[string]string{"zone": fmt.Sprint(i % 100)}
		}
		snap.Sessions = append(snap.Sessions, s, placed(fmt.Sprintf("p%05d", i), node.ID, fleet.StateRunning))
	}
	return snap
}

func TestPlanIsFast(t *testing.T) {
	snap := large(10_000)
	start := time.Now()
	actions := Plan(snap, start)
	if took := time.Since(start); took > 5*time.Second { // tens of milliseconds; the race detector and busy machines are slower
		t.Errorf("10,000 nodes and 20,000 sessions took %v", took)
	}
	if len(actions) != 10_000 {
		t.Errorf("%d actions", len(actions))
	}
}

func BenchmarkPlan10000(b *testing.B) {
	snap := large(10_000)
	for b.Loop() {
		Plan(snap, time.Time{})
	}
}
