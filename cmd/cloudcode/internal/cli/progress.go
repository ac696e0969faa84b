package cli

import (
	"fmt"
	"io"
	"strings"
	"time"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// startView shows how a session starts, or is suspended: on a terminal a live
// line that becomes one finished line per phase, elsewhere one line when a phase
// begins.
type startView struct {
	w     io.Writer
	scr   screen // nil: no terminal
	style style
	now   func() time.Time
	final string // the phase that is waited for

	began   time.Time
	current step
	since   time.Time
	node    string // whose "placed" line is out
	frame   int
	drawn   bool
}

// step is what a session does at the moment.
type step struct {
	phase  string
	reason string
	text   string
	done   int64 // bytes
	total  int64
}

// Phases that can be waited for.
const (
	phaseReady     = "ready"
	phaseSuspended = "suspended"
)

func newStartView(w io.Writer, now func() time.Time) *startView {
	return &startView{w: w, scr: screenOf(w), style: styleOf(w), now: now, final: phaseReady, began: now()}
}

// stepOf puts a session's state into words.
func stepOf(s *cloudcodev1.Session) step {
	p := s.GetProgress()
	st := step{phase: p.GetPhase(), reason: s.GetReason(), done: p.GetCurrentBytes(), total: p.GetTotalBytes()}
	switch s.GetState() {
	case cloudcodev1.Session_RUNNING:
		return step{phase: phaseReady, text: "ready"}
	case cloudcodev1.Session_SUSPENDED:
		return step{phase: phaseSuspended, text: "suspended"}
	case cloudcodev1.Session_SUSPENDING:
		if st.phase == "" {
			st.phase = "stop"
		}
		st.text = map[string]string{"checkpoint": "saving", "stop": "stopping"}[st.phase]
		if st.text == "" {
			st.text = st.phase
		}
		if d := oneLine(p.GetDetail()); d != "" {
			st.text += ": " + d
		}
	case cloudcodev1.Session_PENDING, cloudcodev1.Session_STATE_UNSPECIFIED:
		st.phase, st.text = "pending", "waiting for a node"
	case cloudcodev1.Session_STARTING:
		if st.phase == "" {
			st.phase = "placed"
		}
		switch st.phase {
		case "placed":
			st.text = "placed on " + idOf(s.GetNode())
		case "opencode":
			st.text = "waiting for OpenCode"
		default:
			st.text = st.phase
		}
		if d := oneLine(p.GetDetail()); d != "" && st.phase != "placed" {
			st.text = strings.Replace(st.phase, "opencode", "OpenCode", 1) + ": " + d
		}
	default:
		st.phase, st.text = strings.ToLower(s.GetState().String()), strings.ToLower(s.GetState().String())
	}
	if why := why(s); why != "" {
		st.text += " (" + why + ")"
	}
	return st
}

// why is a session's reason and message in one line.
func why(s *cloudcodev1.Session) string {
	reason, message := s.GetReason(), oneLine(s.GetMessage())
	if reason != "" && message != "" {
		return reason + ": " + message
	}
	return reason + message
}

// show takes in the session as it is now.
func (v *startView) show(s *cloudcodev1.Session) {
	next := stepOf(s)
	// A quick start is past this before anyone looks; where it went matters.
	if n := s.GetNode(); n != "" && n != v.node {
		v.node = n
		if next.phase != "placed" {
			v.begin(step{phase: "placed", text: "placed on " + idOf(n)})
		}
	}
	if next.phase == v.current.phase && next.reason == v.current.reason {
		v.current = next
		v.draw()
		return
	}
	v.begin(next)
	if next.phase == v.final {
		v.finish(true)
	}
}

// begin ends the current step and starts another.
func (v *startView) begin(next step) {
	if v.current.phase != "" && v.current.phase != next.phase {
		v.finish(true)
	}
	v.current, v.since = next, v.now()
	if v.scr == nil && next.phase != v.final {
		fmt.Fprintln(v.w, next.text)
		return
	}
	v.draw()
}

// finish makes the live line a lasting one.
func (v *startView) finish(ok bool) {
	if v.current.phase == "" {
		return
	}
	if v.scr == nil {
		if v.current.phase == v.final {
			fmt.Fprintf(v.w, "%s after %s\n", v.final, short(v.now().Sub(v.began)))
		}
		v.current = step{}
		return
	}
	mark, took := v.style.green("✓"), v.now().Sub(v.since)
	if !ok {
		mark = v.style.red("✗")
	}
	if v.current.phase == v.final {
		took = v.now().Sub(v.began)
	}
	v.clear()
	fmt.Fprintf(v.w, "%s %s  %s\n", mark, v.fit(v.current.text, 12), v.style.dim(short(took)))
	v.current = step{}
}

// tick moves the spinner.
func (v *startView) tick() {
	v.frame++
	v.draw()
}

var spinner = []string{"⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"}

func (v *startView) draw() {
	if v.scr == nil || v.current.phase == "" {
		return
	}
	tail := short(v.now().Sub(v.since))
	if b := bar(v.current.done, v.current.total, v.cells()); b != "" {
		tail = b + "  " + tail
	}
	v.clear()
	fmt.Fprintf(v.w, "%s %s  %s", spinner[v.frame%len(spinner)], v.fit(v.current.text, len([]rune(tail))+6), v.style.dim(tail))
	v.drawn = true
}

// clear removes the live line.
func (v *startView) clear() {
	if v.drawn {
		fmt.Fprint(v.w, "\r\x1b[K")
		v.drawn = false
	}
}

// cells is how long a bar there is room for.
func (v *startView) cells() int {
	if w := v.scr.Width(); w > 0 && w < 80 {
		return 0
	}
	return 20
}

// fit cuts text so that the line does not wrap: a wrapped line cannot be redrawn.
func (v *startView) fit(text string, reserved int) string {
	width := v.scr.Width()
	if width <= 0 {
		width = 80
	}
	return shorten(text, max(width-reserved, 10))
}

// bar shows bytes done; empty when they are not known.
func bar(done, total int64, cells int) string {
	switch {
	case total > 0 && cells == 0:
		return formatBytes(done) + " of " + formatBytes(total)
	case total > 0:
		full := int(float64(min(done, total)) / float64(total) * float64(cells))
		return fmt.Sprintf("[%s%s] %s of %s", strings.Repeat("#", full), strings.Repeat("-", cells-full), formatBytes(done), formatBytes(total))
	case done > 0:
		return formatBytes(done)
	}
	return ""
}

// short shows how long something took.
func short(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return duration(d)
}
