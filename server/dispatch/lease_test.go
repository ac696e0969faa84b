package dispatch

import (
	"math/rand/v2"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

func TestRegister(t *testing.T) {
	bubble(t, func(f *fixture) {
		if _, err := f.client.Register(f.Context(), &nodev1.RegisterRequest{}); status.Code(err) != codes.Unauthenticated {
			f.Errorf("without an identity: %v", err)
		}
		resp := f.register("n1")
		if resp.GetHeartbeatPeriod().AsDuration() < minPeriod || resp.GetLeaseDuration().AsDuration() < 3*resp.GetHeartbeatPeriod().AsDuration()-3*time.Millisecond {
			f.Errorf("period %v, lease %v", resp.GetHeartbeatPeriod().AsDuration(), resp.GetLeaseDuration().AsDuration())
		}
		n := f.node("n1")
		if n.State != fleet.NodeReady || n.RegistrationID != resp.GetRegistrationId() || n.Info.Version != "v1" || n.Labels["zone"] != "a" || n.CreateTime.IsZero() {
			f.Errorf("node %+v", n)
		}
		created := n.CreateTime
		wait(time.Second)
		again := f.register("n1")
		if again.GetRegistrationId() == resp.GetRegistrationId() {
			f.Error("the registration is not a new one")
		}
		if got := f.node("n1").CreateTime; !got.Equal(created) {
			f.Errorf("made again at %v", got)
		}
		wantExpired(f.T, f.heartbeat("n1", resp.GetRegistrationId()))
		wantExpired(f.T, f.heartbeat("n2", again.GetRegistrationId()))
		if err := f.heartbeat("n1", again.GetRegistrationId()); err != nil {
			f.Error(err)
		}
		if got := f.d.HeartbeatTime("n1"); !got.Equal(time.Now()) {
			f.Errorf("heartbeat time %v, now %v", got, time.Now())
		}
		if got := f.d.HeartbeatTime("n2"); !got.IsZero() {
			f.Errorf("heartbeat time of an unknown node: %v", got)
		}
	})
}

func TestExpiry(t *testing.T) {
	bubble(t, func(f *fixture) {
		reg := f.register("n1")
		lease := reg.GetLeaseDuration().AsDuration()
		f.beat("n1", reg.GetRegistrationId(), 2*time.Hour)
		f.wantState("n1", fleet.NodeReady)
		w := f.watch("n1", reg.GetRegistrationId())
		if err := f.heartbeat("n1", reg.GetRegistrationId()); err != nil {
			f.Fatal(err)
		}
		last := time.Now()
		wait(lease - time.Millisecond)
		f.wantState("n1", fleet.NodeReady)
		wait(2 * time.Millisecond)
		n := f.node("n1")
		if n.State != fleet.NodeNotReady || n.Reason != fleet.ReasonHeartbeatMissed || n.Message == "" || !n.HeartbeatTime.Equal(last) {
			f.Errorf("after its lease: %+v", n)
		}
		<-w.done
		wantExpired(f.T, w.err)
		// It does not come back by a heartbeat, and does not flap: it has to
		// register, and has a full lease then.
		wantExpired(f.T, f.heartbeat("n1", reg.GetRegistrationId()))
		_, err := f.report("n1", reg.GetRegistrationId(), running("a"))
		wantExpired(f.T, err)
		f.wantState("n1", fleet.NodeNotReady)
		f.register("n1")
		f.wantState("n1", fleet.NodeReady)
		wait(lease - time.Millisecond)
		f.wantState("n1", fleet.NodeReady)
		wait(time.Second)
		f.wantState("n1", fleet.NodeNotReady)
	})
}

func TestGraceAfterRestart(t *testing.T) {
	bubble(t, func(f *fixture) {
		reg := f.register("n1")
		f.register("n2")
		lease := reg.GetLeaseDuration().AsDuration()
		wait(lease - time.Second)
		f.stop()
		wait(24 * time.Hour)
		f.start()
		f.wantState("n1", fleet.NodeReady)
		wait(lease - time.Second)
		f.wantState("n1", fleet.NodeReady)
		// The registration is still good, and its streams too.
		if err := f.heartbeat("n1", reg.GetRegistrationId()); err != nil {
			f.Errorf("a registration of before the restart: %v", err)
		}
		w := f.watch("n1", reg.GetRegistrationId())
		if w.assigned == nil {
			f.Errorf("no full set: %v", w.err)
		}
		wait(2 * time.Second)
		f.wantState("n1", fleet.NodeReady)
		f.wantState("n2", fleet.NodeNotReady)
		w.cancel()
		<-w.done
	})
}

// TestExpiryComparesTheRegistration: what is left of an older lease must not end
// a newer registration.
func TestExpiryComparesTheRegistration(t *testing.T) {
	bubble(t, func(f *fixture) {
		old := f.register("n1")
		now := f.register("n1")
		if err := f.d.storeLapsed(f.Context(), []lapsed{{node: "n1", registration: old.GetRegistrationId()}, {node: "never was"}}); err != nil {
			f.Fatal(err)
		}
		f.wantState("n1", fleet.NodeReady)
		if err := f.d.storeLapsed(f.Context(), []lapsed{{node: "n1", registration: now.GetRegistrationId()}}); err != nil {
			f.Fatal(err)
		}
		f.wantState("n1", fleet.NodeNotReady)
	})
}

func TestNewRegistrationEndsOldStreams(t *testing.T) {
	bubble(t, func(f *fixture) {
		old := f.register("n1")
		w := f.watch("n1", old.GetRegistrationId())
		other := f.register("n2")
		w2 := f.watch("n2", other.GetRegistrationId())
		now := f.register("n1")
		<-w.done
		wantExpired(f.T, w.err)
		again := f.watch("n1", old.GetRegistrationId())
		<-again.done
		wantExpired(f.T, again.err)
		good := f.watch("n1", now.GetRegistrationId())
		if good.assigned == nil || w2.err != nil {
			f.Errorf("new stream: %v, other node's stream: %v", good.err, w2.err)
		}
		good.cancel()
		w2.cancel()
		<-good.done
		<-w2.done
	})
}

// TestServerThatDidNotRun blames nobody for a silence of its own.
func TestServerThatDidNotRun(t *testing.T) {
	now := time.Now()
	d := New(Config{})
	d.nodes["n1"] = &registration{id: "r", deadline: now, over: make(chan struct{})}
	later := now.Add(late + time.Second)
	if found, next := d.lapse(later, now); len(found) != 0 || next < leasePeriods*minPeriod {
		t.Errorf("lapsed %v, next in %v", found, next)
	}
	end := d.nodes["n1"].deadline
	if found, _ := d.lapse(end.Add(time.Second), end); len(found) != 1 || found[0].registration != "r" {
		t.Errorf("lapsed %v", found)
	}
}

func TestPeriodGrowsWithTheFleet(t *testing.T) {
	d := New(Config{})
	for _, tt := range []struct {
		nodes int
		want  time.Duration
	}{{0, minPeriod}, {500, minPeriod}, {1000, 10 * time.Second}, {10_000, 100 * time.Second}} {
		d.known = tt.nodes
		seen := map[time.Duration]bool{}
		for range 100 {
			period, lease := d.terms()
			if period < tt.want || period > tt.want+tt.want/jitterPart || lease < 3*period {
				t.Errorf("%d nodes: period %v, lease %v", tt.nodes, period, lease)
			}
			seen[period] = true
		}
		if len(seen) < 50 {
			t.Errorf("%d nodes: only %d different periods", tt.nodes, len(seen))
		}
	}
}

// TestManyNodesFallSilent: each at its own time, all of them in the end, and
// those that beat never.
func TestManyNodesFallSilent(t *testing.T) {
	bubble(t, func(f *fixture) {
		const nodes = 60
		reg := map[string]string{}
		for i := range nodes {
			id := "n" + string(rune('a'+i%26)) + string(rune('a'+i/26))
			reg[id] = f.register(id).GetRegistrationId()
		}
		silent := map[string]bool{}
		for range 40 {
			for id, r := range reg {
				if silent[id] {
					continue
				}
				if rand.IntN(40) == 0 {
					silent[id] = true
					continue
				}
				if err := f.heartbeat(id, r); err != nil {
					f.Fatalf("%s: %v", id, err)
				}
			}
			wait(minPeriod)
		}
		for id, r := range reg {
			if !silent[id] {
				if err := f.heartbeat(id, r); err != nil {
					f.Fatal(err)
				}
			}
		}
		wait(12 * time.Second)
		for id, r := range reg {
			if !silent[id] {
				if err := f.heartbeat(id, r); err != nil {
					f.Fatal(err)
				}
			}
		}
		wait(12 * time.Second)
		for id := range reg {
			want := fleet.NodeReady
			if silent[id] {
				want = fleet.NodeNotReady
			}
			f.wantState(id, want)
		}
		f.Logf("%d of %d fell silent", len(silent), nodes)
	})
}

func TestExpiryIsTriedAgain(t *testing.T) {
	bubble(t, func(f *fixture) {
		reg := f.register("n1")
		f.faults.set(time.Now().Add(reg.GetLeaseDuration().AsDuration()+10*time.Second), "")
		wait(reg.GetLeaseDuration().AsDuration() + 5*time.Second)
		f.wantState("n1", fleet.NodeReady) // cannot be stored
		wantExpired(f.T, f.heartbeat("n1", reg.GetRegistrationId()))
		wait(10 * time.Second)
		f.wantState("n1", fleet.NodeNotReady)
	})
}
