package api

import (
	"strings"
	"testing"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

func TestFilter(t *testing.T) {
	sess := &fleet.Session{
		State: fleet.StateRunning, Assignment: &fleet.Assignment{Node: "node-1"},
		Labels: map[string]string{"team": "web", "app.kubernetes.io/name": "x", "my-key": "a-b", "n": "1", "empty": "", "truth": "true", "v": "1.5"},
	}
	unplaced := &fleet.Session{State: fleet.StatePending}
	for filter, want := range map[string][2]bool{
		``:                                     {true, true},
		`state = RUNNING`:                      {true, false},
		`state = "RUNNING"`:                    {true, false},
		`state != RUNNING`:                     {false, true},
		`NOT state = RUNNING`:                  {false, true},
		`node = "nodes/node-1"`:                {true, false},
		`node = "node-1"`:                      {true, false},
		`node = ""`:                            {false, true},
		`labels.team = web`:                    {true, false},
		`labels.team != web`:                   {false, true},
		`labels.app.kubernetes.io/name = x`:    {true, false},
		`labels."my-key" = "a-b"`:              {true, false},
		`labels.n = 1`:                         {true, false},
		`labels.v = 1.5`:                       {true, false},
		`labels.truth = true`:                  {true, false},
		`labels.empty = ""`:                    {true, false},
		`labels:empty`:                         {true, false},
		`labels:"app.kubernetes.io/name"`:      {true, false},
		`labels.team:*`:                        {true, false},
		`-labels:team`:                         {false, true},
		`state = RUNNING AND labels.team = db`: {false, false},
		`state = PENDING OR labels.team = web`: {true, true},
		`state = RUNNING labels:team`:          {true, false},
		`(state = PENDING OR labels:nope) AND NOT labels:team`: {false, true},
	} {
		p, err := parseFilter(filter)
		if err != nil {
			t.Errorf("%s: %v", filter, err)
			continue
		}
		if got := [2]bool{p(sess), p(unplaced)}; got != want {
			t.Errorf("%s: %v, want %v", filter, got, want)
		}
	}
	for _, filter := range []string{
		`state = SLEEPING`, `web`, `name = x`, `state`, `state > RUNNING`, `state:RUNNING`, `labels = x`, `labels.a < 3`, `(`, `f(x)`, `f(x) = 1`,
		`state = RUNNING AND`, `NOT web`, `a OR b`, strings.Repeat("a", 5000), "state.x = RUNNING",
	} {
		if p, err := parseFilter(filter); err == nil {
			t.Errorf("%s is accepted: %v", short(filter), p(sess))
		} else if len(err.Error()) < 10 {
			t.Errorf("%s: %v", filter, err)
		}
	}
}

func FuzzFilter(f *testing.F) {
	f.Add(`state = RUNNING AND labels.team = "web"`)
	f.Add(`-labels:x OR (node = n)`)
	f.Fuzz(func(_ *testing.T, filter string) {
		if p, err := parseFilter(filter); err == nil {
			p(&fleet.Session{}) // must not panic
		}
	})
}
