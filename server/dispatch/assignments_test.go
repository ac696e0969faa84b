package dispatch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

func TestAssignments(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.put(session("a", "n1"), session("b", "n2"))
		reg := f.register("n1")
		w := f.watch("n1", reg.GetRegistrationId())
		if len(w.assigned) != 1 {
			f.Fatalf("full set %v", w.assigned)
		}
		a := w.assigned["a"]
		if a.GetSessionUid() != "u-a" || a.GetGeneration() != 1 || a.GetDesiredState() != nodev1.Assignment_RUN ||
			a.GetOpencodePassword() != "secret" || a.GetSpec().GetImage() != "i" {
			f.Errorf("assignment %v", a)
		}
		c := session("c", "n1")
		f.put(c)
		f.wantSeen(w, "+c u-c 1 RUN")
		// What does not concern the node is not sent.
		c.Progress = &fleet.Progress{Phase: "image", Current: 1}
		f.put(c)
		f.put(session("d", "n2"))
		f.wantSeen(w)
		c.Assignment.Delete = true
		f.put(c)
		f.wantSeen(w, "+c u-c 1 DELETE")
		c.Assignment = nil
		f.put(c)
		f.wantSeen(w, "-c")
		// Moved away, and here.
		b := session("b", "n1")
		b.Assignment.Generation = 2
		f.put(session("a", "n2"), b)
		f.wantSeen(w, "-a", "+b u-b 2 RUN")
		b.Assignment.Generation = 3
		f.put(b)
		f.wantSeen(w, "+b u-b 3 RUN")
		// Deleted and made again in one go: the node must let go of the old one.
		b2 := session("b", "n1")
		b2.UID = "u-b2"
		f.update(func(tx store.Tx) error {
			if err := tx.DeleteSession("b"); err != nil {
				return err
			}
			return tx.PutSession(b2)
		})
		f.wantSeen(w, "-b", "+b u-b2 1 RUN")
		f.update(func(tx store.Tx) error { return tx.DeleteSession("b") })
		f.wantSeen(w, "-b")
		w.cancel()
		<-w.done
		// A node that was away finds everything in the full set.
		f.put(session("e", "n1"))
		w = f.watch("n1", reg.GetRegistrationId())
		if len(w.assigned) != 1 || w.assigned["e"] == nil {
			f.Errorf("after a reconnect: %v", w.assigned)
		}
		w.cancel()
		<-w.done
		synctest.Wait()
		f.d.mirror.mu.Lock()
		if len(f.d.mirror.watchers) != 0 {
			f.Error("watchers are left")
		}
		f.d.mirror.mu.Unlock()
	})
}

func TestAssignedStorage(t *testing.T) {
	bubble(t, func(f *fixture) {
		a, local := session("a", "n1"), session("local", "n1")
		a.Assignment.Spec.Storage = fleet.Storage{Mode: fleet.ModeSnapshot, Profile: "default", Bucket: "b", Prefix: "p"}
		a.Labels = map[string]string{"team": "web"}
		f.put(a, local)
		n1, n2 := f.register("n1"), f.register("n2")
		w, other := f.watch("n1", n1.GetRegistrationId()), f.watch("n2", n2.GetRegistrationId())
		got := w.assigned["a"]
		if st := got.GetStorage(); st.GetSecretAccessKey() != "key of default" || st.GetPrefix() != "p" || got.GetLabels()["team"] != "web" {
			f.Errorf("assignment %v", got)
		}
		if got.GetHasWorkspace() || w.assigned["local"].GetStorage() != nil {
			f.Errorf("local assignment %v", w.assigned["local"])
		}
		a.Assignment.Suspend = true
		f.put(a)
		f.wantSeen(w, "+a u-a 1 SUSPEND")
		a.Assignment.Delete = true
		f.put(a)
		f.wantSeen(w, "+a u-a 1 DELETE")
		a.Labels, a.Purge = map[string]string{"team": "db"}, true
		f.put(a)
		f.wantSeen(w, "+a u-a 1 DELETE")
		if got := w.assigned["a"]; !got.GetPurgeStorage() || got.GetLabels()["team"] != "db" {
			f.Errorf("assignment %v", got)
		}
		a.Purge = false
		f.put(a)
		f.wantSeen(w, "+a u-a 1 DELETE")
		// Suspended, and on to another node.
		a.Assignment = nil
		f.put(a)
		f.wantSeen(w, "-a")
		f.wantSeen(other)
		a.ReadyTime = time.Now()
		a.Assignment = &fleet.Assignment{
			Node: "n2", Generation: 2, Spec: fleet.Spec{Storage: fleet.Storage{Mode: fleet.ModeMount}}, RestoreCheckpoint: "c1", RestoreGeneration: 2,
		}
		f.put(a)
		f.wantSeen(other, "+a u-a 2 RUN")
		f.wantSeen(w)
		if got := other.assigned["a"]; got.GetRestoreCheckpoint() != "c1" || got.GetRestoreGeneration() != 2 || !got.GetHasWorkspace() {
			f.Errorf("assignment %v", got)
		}
		for _, w := range []*watched{w, other} {
			w.cancel()
			<-w.done
		}
	})
}

// A node that suspends a session says so, and has it no longer.
func TestSuspendedReport(t *testing.T) {
	bubble(t, func(f *fixture) {
		a := session("a", "n1")
		a.State, a.Suspended, a.Assignment.Suspend = fleet.StateSuspending, true, true
		a.Spec.Storage.Mode = fleet.ModeSnapshot
		f.put(a)
		reg := f.register("n1")
		say := func(state nodev1.SessionStatus_State) nodev1.ReportResult_Code {
			resp, err := f.client.ReportStatus(as(f.Context(), "n1"), &nodev1.ReportStatusRequest{
				RegistrationId: reg.GetRegistrationId(), Statuses: []*nodev1.SessionStatus{{
					SessionId: "a", SessionUid: "u-a", Generation: 1, State: state,
					Progress: &cloudcodev1.StartProgress{Phase: "checkpoint", CurrentBytes: 1},
					Storage:  &cloudcodev1.StorageStatus{Checkpoint: &cloudcodev1.Checkpoint{Id: "c1", Notes: []string{"a socket"}}, Message: "m"},
				}},
			})
			if err != nil {
				f.Fatal(err)
			}
			return resp.GetResults()[0].GetCode()
		}
		if code := say(nodev1.SessionStatus_SUSPENDING); code != nodev1.ReportResult_STORED {
			f.Errorf("SUSPENDING: %s", code)
		}
		s, _ := f.session("a")
		if s.State != fleet.StateSuspending || s.Progress.Phase != "checkpoint" || s.Storage.Checkpoint.ID != "c1" || s.Storage.Checkpoint.Notes != nil || s.Storage.Message != "m" {
			f.Errorf("while it is saved: %+v, %+v", s, s.Storage)
		}
		if code := say(nodev1.SessionStatus_SUSPENDED); code != nodev1.ReportResult_STORED {
			f.Errorf("SUSPENDED: %s", code)
		}
		if s, _ := f.session("a"); s.State != fleet.StateSuspended || s.Assignment != nil || s.Storage.Checkpoint.ID != "c1" {
			f.Errorf("suspended: %+v", s)
		}
		if code := say(nodev1.SessionStatus_SUSPENDED); code != nodev1.ReportResult_STALE {
			f.Errorf("once more: %s", code)
		}
	})
}

func TestManyAssignments(t *testing.T) {
	bubble(t, func(f *fixture) {
		const n = 10_000
		var all []*fleet.Session
		for i := range n {
			s := session(fmt.Sprintf("s%05d", i), "n1")
			if i%100 == 0 {
				s.Assignment.Spec.OpenCodeConfig = strings.Repeat("x", 50_000)
			}
			all = append(all, s)
		}
		f.put(all...)
		reg := f.register("n1")
		w := f.watch("n1", reg.GetRegistrationId())
		if len(w.assigned) != n {
			f.Fatalf("%d assignments: %v", len(w.assigned), w.err)
		}
		if w.largest > chunkBytes+60_000 {
			f.Errorf("a message of %d bytes", w.largest)
		}
		// More in one transaction than the store keeps for watchers: the mirror reads
		// everything again, and the node gets what has changed.
		for _, s := range all {
			s.Assignment.Generation++
		}
		f.put(all...)
		f.update(func(tx store.Tx) error { return tx.DeleteSession("s00007") })
		wait(5 * time.Second)
		if len(w.assigned) != n-1 {
			f.Errorf("%d assignments", len(w.assigned))
		}
		for id, a := range w.assigned {
			if a.GetGeneration() != 2 {
				f.Fatalf("%s has generation %d", id, a.GetGeneration())
			}
		}
		if w.largest > chunkBytes+60_000 {
			f.Errorf("a message of %d bytes", w.largest)
		}
		w.cancel()
		<-w.done
	})
}

func TestGatewayList(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.gateways.set("g1")
		reg := f.register("n1")
		w := f.watch("n1", reg.GetRegistrationId())
		for _, ids := range [][]string{{"g1"}, {"g1", "g2"}, nil, {"g3"}} {
			f.gateways.set(ids...)
			synctest.Wait()
			var want []string
			for _, id := range ids {
				want = append(want, id+"="+id+":1")
			}
			w.mu.Lock()
			if !slices.Equal(w.gateways, want) {
				f.Errorf("gateways %q, want %q", w.gateways, want)
			}
			w.mu.Unlock()
		}
		w.cancel()
		<-w.done
	})
}

func TestReports(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.put(session("a", "n1"), session("b", "n1"), session("c", "n2"))
		reg := f.register("n1").GetRegistrationId()
		old := func(s *nodev1.SessionStatus) { s.Generation = 0 }
		got, err := f.report("n1", reg,
			running("a"), running("nobody"), running("b", old), running("c"), running("b", func(s *nodev1.SessionStatus) { s.State = 99 }), running("b"))
		stored, stale := nodev1.ReportResult_STORED, nodev1.ReportResult_STALE
		if err != nil || !slices.Equal(got, []nodev1.ReportResult_Code{stored, stale, stale, stale, stale, stored}) {
			f.Fatalf("%v, %v", got, err)
		}
		for id, want := range map[string]fleet.State{"a": fleet.StateRunning, "b": fleet.StateRunning, "c": fleet.StateStarting} {
			if s, _ := f.session(id); s.State != want {
				f.Errorf("%s is %s, want %s", id, s.State, want)
			}
		}
		// The same again is acknowledged, and not written.
		before, events := f.session("a")
		if got, err := f.report("n1", reg, running("a")); err != nil || got[0] != stored {
			f.Errorf("%v, %v", got, err)
		}
		if after, e := f.session("a"); after.Revision != before.Revision || e != events || e != 1 {
			f.Errorf("written again: revision %d after %d, %d events after %d", after.Revision, before.Revision, e, events)
		}
		if got, err := f.report("n1", reg); err != nil || len(got) != 0 {
			f.Errorf("an empty report: %v, %v", got, err)
		}
	})
}

func TestProgressIsNoEvent(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.put(session("a", "n1"))
		reg := f.register("n1").GetRegistrationId()
		phase := func(name string, n int64) *nodev1.SessionStatus {
			return running("a", func(s *nodev1.SessionStatus) {
				s.State, s.Progress = nodev1.SessionStatus_STARTING, &cloudcodev1.StartProgress{Phase: name, CurrentBytes: n}
			})
		}
		for i := range 50 {
			if _, err := f.report("n1", reg, phase("image", int64(i))); err != nil {
				f.Fatal(err)
			}
		}
		if s, events := f.session("a"); events != 1 || s.Progress.Current != 49 {
			f.Errorf("%d events, progress %+v", events, s.Progress)
		}
		if _, err := f.report("n1", reg, phase("container", 0), running("a", func(s *nodev1.SessionStatus) { s.ReadyTime = timestamppb.Now() })); err != nil {
			f.Fatal(err)
		}
		if s, events := f.session("a"); events != 3 || s.State != fleet.StateRunning || s.Progress != nil {
			f.Errorf("%d events, session %+v", events, s)
		}
	})
}

func TestGone(t *testing.T) {
	bubble(t, func(f *fixture) {
		s := session("a", "n1")
		s.Deleting, s.State, s.Assignment.Delete = true, fleet.StateDeleting, true
		f.put(s)
		reg := f.register("n1").GetRegistrationId()
		w := f.watch("n1", reg)
		got, err := f.report("n1", reg, running("a", func(s *nodev1.SessionStatus) { s.State = nodev1.SessionStatus_GONE }))
		if err != nil || got[0] != nodev1.ReportResult_STORED {
			f.Fatalf("%v, %v", got, err)
		}
		if s, _ := f.session("a"); s.Assignment != nil || s.State != fleet.StateDeleting {
			f.Errorf("session %+v", s)
		}
		f.wantSeen(w, "-a")
		w.cancel()
		<-w.done
	})
}

// TestManyReports: calls at the same time share transactions, and each gets its
// own answers.
func TestManyReports(t *testing.T) {
	bubble(t, func(f *fixture) {
		const nodes, each = 50, 40
		var all []*fleet.Session
		for n := range nodes {
			for i := range each {
				all = append(all, session(fmt.Sprintf("s%d-%d", n, i), fmt.Sprintf("n%d", n)))
			}
		}
		f.put(all...)
		regs := map[int]string{}
		for n := range nodes {
			regs[n] = f.register(fmt.Sprintf("n%d", n)).GetRegistrationId()
		}
		before := f.revision()
		var wg sync.WaitGroup
		for n := range nodes {
			wg.Go(func() {
				var statuses []*nodev1.SessionStatus
				for i := range each {
					statuses = append(statuses, running(fmt.Sprintf("s%d-%d", n, i)), running(fmt.Sprintf("s%d-%d", (n+1)%nodes, i)))
				}
				got, err := f.report(fmt.Sprintf("n%d", n), regs[n], statuses...)
				if err != nil || len(got) != 2*each {
					f.Errorf("node %d: %d results, %v", n, len(got), err)
					return
				}
				for i, code := range got {
					if want := []nodev1.ReportResult_Code{nodev1.ReportResult_STORED, nodev1.ReportResult_STALE}[i%2]; code != want {
						f.Errorf("node %d, item %d: %v", n, i, code)
					}
				}
			})
		}
		wg.Wait()
		for _, s := range all {
			if got, events := f.session(s.ID); got.State != fleet.StateRunning || events != 1 {
				f.Fatalf("%s is %s with %d events", s.ID, got.State, events)
			}
		}
		f.Logf("%d calls with %d items in %d transactions", nodes, 2*nodes*each, f.revision()-before)
	})
}

func (f *fixture) revision() (r store.Revision) {
	_ = f.store.View(f.Context(), func(tx store.ReadTx) error {
		r = tx.Revision()
		return nil
	})
	return r
}

func TestOneBadItem(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.put(session("a", "n1"), session("bad", "n1"), session("c", "n1"))
		f.faults.set(time.Time{}, "bad")
		reg := f.register("n1").GetRegistrationId()
		got, err := f.report("n1", reg, running("a"), running("bad"), running("c"))
		want := []nodev1.ReportResult_Code{nodev1.ReportResult_STORED, nodev1.ReportResult_RETRY, nodev1.ReportResult_STORED}
		if err != nil || !slices.Equal(got, want) {
			f.Errorf("%v, %v", got, err)
		}
		for _, id := range []string{"a", "c"} {
			if s, _ := f.session(id); s.State != fleet.StateRunning {
				f.Errorf("%s is %s", id, s.State)
			}
		}
	})
}

func TestNothingIsAcknowledgedThatIsNotStored(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.put(session("a", "n1"))
		reg := f.register("n1").GetRegistrationId()
		f.faults.set(time.Now().Add(time.Second), "")
		if got, err := f.report("n1", reg, running("a")); err == nil {
			f.Errorf("acknowledged: %v", got)
		}
		wait(2 * time.Second)
		if got, err := f.report("n1", reg, running("a")); err != nil || got[0] != nodev1.ReportResult_STORED {
			f.Errorf("%v, %v", got, err)
		}
	})
}

// TestReturningNode: lost sessions run again as soon as their node says so.
func TestReturningNode(t *testing.T) {
	bubble(t, func(f *fixture) {
		s := session("a", "n1")
		s.State, s.Reason = fleet.StateLost, fleet.ReasonNodeUnreachable
		f.put(s)
		reg := f.register("n1").GetRegistrationId()
		if _, err := f.report("n1", reg, running("a")); err != nil {
			f.Fatal(err)
		}
		if s, events := f.session("a"); s.State != fleet.StateRunning || s.Reason != "" || events != 1 {
			f.Errorf("session %+v, %d events", s, events)
		}
	})
}

func TestStop(t *testing.T) {
	bubble(t, func(f *fixture) {
		reg := f.register("n1").GetRegistrationId()
		d := f.d
		f.stop()
		err := d.reports.do(f.Context(), &reportCall{node: "n1", registration: reg, done: make(chan struct{})})
		if !errors.Is(err, fleet.ErrUnavailable) {
			f.Errorf("after the end: %v", err)
		}
		// Before it has read the store nobody is answered, and nobody waits for ever.
		d = New(d.config)
		ctx, cancel := context.WithTimeout(f.Context(), time.Second)
		defer cancel()
		d.config.Identify = func(context.Context) (string, error) { return "n1", nil }
		if _, err := d.Heartbeat(ctx, &nodev1.HeartbeatRequest{RegistrationId: reg}); !errors.Is(err, context.DeadlineExceeded) {
			f.Errorf("before it runs: %v", err)
		}
		f.start()
		if code := status.Code(f.heartbeat("n1", reg)); code != codes.OK {
			f.Errorf("after a restart: %v", code)
		}
	})
}
