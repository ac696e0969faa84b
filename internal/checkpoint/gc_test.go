package checkpoint

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// Writers, forks, retention and garbage collection at once, with a grace so short
// that only the rules keep what is needed: every head stays whole.
func TestGarbageCollectionRaces(t *testing.T) {
	m := objstore.NewMemory()
	r := newRig(t, m, nil)
	// An hour on the store's clock passes with every look at it.
	var g sync.WaitGroup
	stop := make(chan struct{})
	var clock sync.Mutex
	var ahead time.Duration
	m.Now = func() time.Time {
		clock.Lock()
		defer clock.Unlock()
		return time.Now().Add(ahead)
	}
	g.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := r.repo.CollectGarbage(t.Context(), GCOptions{Grace: 2 * time.Second}); err != nil {
				t.Error(err)
				return
			}
		}
	})
	policy := Policy{Newest: 2, Kept: time.Nanosecond, Hourly: time.Nanosecond, Daily: time.Nanosecond, Upgrade: time.Nanosecond}
	for i := range 25 {
		r.put(fmt.Sprintf("f%d", i%4), random(uint64(i), 50_000))
		r.save()
		if _, err := r.s.Retain(t.Context(), owner1, policy); err != nil {
			t.Fatal(err)
		}
		fork := r.repo.Session(fmt.Sprintf("fork%d", i))
		list, err := r.s.List(t.Context())
		must(t, err)
		_, err = fork.CopyFrom(t.Context(), r.s, list[len(list)-1].ID, Owner{SessionID: "f"}, Meta{})
		must(t, err)
		must(t, fork.Check(t.Context(), ""))
		// What no manifest names is old enough in no time; the writer's own view of
		// an upload's age is not moved.
		clock.Lock()
		ahead += time.Second
		clock.Unlock()
		if i%3 == 0 {
			must(t, fork.Purge(t.Context()))
		}
	}
	close(stop)
	g.Wait()
	for st, err := range r.repo.Sessions(t.Context()) {
		must(t, errors.Join(err, st.Err))
		must(t, r.repo.Session(st.Prefix).Check(t.Context(), ""))
	}
	r.check()
	for st, err := range r.repo.Sessions(t.Context()) {
		must(t, err)
		must(t, r.repo.Session(st.Prefix).Purge(t.Context()))
	}
	ahead += time.Hour
	if _, err := r.repo.CollectGarbage(t.Context(), GCOptions{Grace: time.Second}); err != nil {
		t.Fatal(err)
	}
	if left := keys(t, m, "root/.cloudcode/v1/packs/"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func TestGarbageCollectionStopsAtDamage(t *testing.T) {
	m := objstore.NewMemory()
	r := newRig(t, m, nil)
	r.put("a", "b")
	id := r.save().ID
	if _, err := m.Put(t.Context(), r.s.key(id), []byte("x"), objstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	st, err := r.repo.CollectGarbage(t.Context(), GCOptions{Grace: time.Nanosecond})
	if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), id) || st.Deleted > 0 {
		t.Errorf("%+v %v", st, err)
	}
}

// Packs of which little is needed give way.
func TestCompaction(t *testing.T) {
	m := objstore.NewMemory()
	r := newRig(t, m, nil)
	for i := range 40 {
		r.put(fmt.Sprintf("f%d", i), random(uint64(i), 500_000))
	}
	r.save()
	for i := range 40 {
		if i%8 != 0 {
			must(t, os.Remove(r.path(fmt.Sprintf("f%d", i))))
		}
	}
	for i := range 4 {
		r.put("tick", fmt.Sprint(i))
		r.save()
	}
	total := int64(0)
	for _, p := range r.w.base.packs {
		total += p.size
	}
	if total > 6<<20 {
		t.Errorf("2.5 MB are needed and %d bytes kept", total)
	}
	r.check()
	for i := range smallPacks * 2 {
		r.put(fmt.Sprintf("small/%d", i), fmt.Sprint(i))
		r.save()
	}
	if n := len(r.w.base.packs); n > smallPacks+10 {
		t.Errorf("%d packs", n)
	}
	r.check()
}

func TestRetentionPolicy(t *testing.T) {
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	rapid.Check(t, func(rt *rapid.T) {
		var all []Info
		at := now
		for i := range rapid.IntRange(0, 300).Draw(rt, "n") {
			at = at.Add(-time.Duration(rapid.IntRange(1, 500_000).Draw(rt, "gap")) * time.Second / 10)
			all = append(all, Info{ID: fmt.Sprint(i), Time: at, Meta: Meta{
				Trigger:         rapid.SampledFrom([]string{"periodic", TriggerTurn}).Draw(rt, "trigger"),
				OpenCodeVersion: rapid.SampledFrom([]string{"1", "1", "1", "1", "2"}).Draw(rt, "version"),
			}})
		}
		gone := map[string]bool{}
		for _, id := range (Policy{}).expired(all, now) {
			gone[id] = true
		}
		hours, days := map[string]bool{}, map[string]bool{}
		for i, c := range all {
			if gone[c.ID] {
				continue
			}
			hours[c.Time.Format("2006010215")], days[c.Time.Format("20060102")] = true, true
			if i >= 20 && now.Sub(c.Time) > 31*24*time.Hour {
				rt.Errorf("%s is kept after 31 days", c.Time)
			}
		}
		for i, c := range all {
			age := now.Sub(c.Time)
			switch {
			case !gone[c.ID]:
			case i < 20, c.Trigger == TriggerTurn && age < 24*time.Hour,
				c.OpenCodeVersion != all[i-1].OpenCodeVersion && age < 30*24*time.Hour:
				rt.Errorf("%d of %s is gone", i, c.Time)
			case age < 48*time.Hour && !hours[c.Time.Format("2006010215")], age < 30*24*time.Hour && !days[c.Time.Format("20060102")]:
				rt.Errorf("nothing is left of the hour or day of %s", c.Time)
			}
		}
		// What is kept is kept again: retention that runs often takes no more.
		var left []Info
		for _, c := range all {
			if !gone[c.ID] {
				left = append(left, c)
			}
		}
		for _, id := range (Policy{}).expired(left, now) {
			rt.Errorf("%s goes the second time", id)
		}
	})
}
