package cli

import (
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/spf13/cobra"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func newSessionEventsCmd() *cobra.Command {
	var after string
	var types []string
	var follow bool
	cmd := &cobra.Command{
		Use:   "events ID",
		Short: "Follow what happens in a session",
		Long: `Follow a session's events: its lifecycle, and all events of its OpenCode, one line
each; with -o json one JSON object per line, complete. It goes on by itself when
the server restarts, and ends when the session is deleted. The id in front of an
event, given to --after, goes on behind it.`,
		Example: `  cloudcode session events main --type lifecycle
  cloudcode session events main --type 'message.*,session.status' -o json`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeSessions(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			name, err := sessionName(a[0])
			if err != nil {
				return err
			}
			for _, t := range types {
				if _, err := path.Match(t, ""); err != nil {
					return usagef("--type %q: %w", t, err)
				}
			}
			p := &eventPrinter{w: cmd.OutOrStdout(), json: outputOf(cmd) == formatJSON, types: types, style: styleOf(cmd.OutOrStdout())}
			if s := screenOf(p.w); s != nil {
				p.width = s.Width()
			}
			return withClient(cmd, func(c *client) error {
				heartbeats := 0
				return c.follow(cmd.Context(), name, after, func(ev *cloudcodev1.SessionEvent) error {
					if ev.GetHeartbeat() != nil {
						// The first comes at once, the next when there is nothing to tell.
						if heartbeats++; !follow && heartbeats > 1 {
							return errStop
						}
						return nil
					}
					return p.print(ev)
				}, func(err error) {
					fmt.Fprintf(cmd.ErrOrStderr(), "connection lost (%s); trying again\n", explain(err).Msg)
				})
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&after, "after", "", "go on behind the event with this `ID` (default: from now on)")
	f.StringSliceVar(&types, "type", nil, "only events of this `TYPE`: lifecycle, checkpointed, opencode, gap, end, or a type of OpenCode's such as message.updated; * matches any part; can be repeated")
	f.BoolVarP(&follow, "follow", "f", true, "go on with new events; with --follow=false it ends at the first pause")
	complete(cmd, "type", "lifecycle", "checkpointed", "opencode", "gap", "end", "message.*", "session.status", "session.*")
	return cmd
}

type eventPrinter struct {
	w     io.Writer
	json  bool
	types []string
	style style
	width int // of the terminal; 0: no limit
}

// kindOf returns an event's kind and, for OpenCode's, its type.
func kindOf(ev *cloudcodev1.SessionEvent) (kind, typ string) {
	switch e := ev.GetEvent().(type) {
	case *cloudcodev1.SessionEvent_Lifecycle:
		return "lifecycle", ""
	case *cloudcodev1.SessionEvent_Opencode:
		return "opencode", e.Opencode.GetType()
	case *cloudcodev1.SessionEvent_Gap:
		return "gap", ""
	case *cloudcodev1.SessionEvent_End:
		return "end", ""
	case *cloudcodev1.SessionEvent_Checkpointed:
		return "checkpointed", ""
	case *cloudcodev1.SessionEvent_Heartbeat:
		return "heartbeat", ""
	}
	return "unknown", ""
}

func (p *eventPrinter) wanted(kind, typ string) bool {
	for _, t := range p.types {
		if ok, _ := path.Match(t, kind); ok {
			return true
		}
		if ok, _ := path.Match(t, typ); ok && typ != "" {
			return true
		}
	}
	return len(p.types) == 0
}

func (p *eventPrinter) print(ev *cloudcodev1.SessionEvent) error {
	kind, typ := kindOf(ev)
	if !p.wanted(kind, typ) {
		return nil
	}
	if p.json {
		line, err := jsonOf(ev, false)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(p.w, "%s\n", line)
		return err
	}
	when := ""
	if ev.GetTime().IsValid() {
		when = ev.GetTime().AsTime().In(now().Location()).Format("15:04:05.000")
	}
	what, text := kind, ""
	switch kind {
	case "lifecycle":
		text = lifecycleText(ev.GetLifecycle().GetSession())
	case "opencode":
		what, text = typ, frameText(ev.GetOpencode())
	case "gap":
		text = ev.GetGap().GetMessage()
	case "checkpointed":
		text = checkpointText(ev.GetCheckpointed().GetCheckpoint())
	case "end":
		text = ev.GetEnd().GetReason()
	}
	head := fmt.Sprintf("%-12s  %-10s  %-22s  ", when, plain(ev.GetId()), plain(what))
	text = oneLine(text)
	if p.width > 0 {
		text = shorten(text, max(p.width-len([]rune(head)), 20))
	}
	line := strings.TrimRight(head+text, " ")
	switch {
	case kind == "gap":
		line = p.style.red(line)
	case kind == "lifecycle", kind == "checkpointed":
		line = p.style.green(line)
	}
	_, err := fmt.Fprintln(p.w, line)
	return err
}

func lifecycleText(s *cloudcodev1.Session) string {
	st := stepOf(s)
	switch s.GetState() {
	case cloudcodev1.Session_PENDING, cloudcodev1.Session_STARTING:
		return s.GetState().String() + " " + strings.TrimSpace(st.text+"  "+bar(st.done, st.total, 0))
	}
	out := s.GetState().String()
	if w := why(s); w != "" {
		out += " " + w
	}
	if s.GetNode() != "" {
		out += " on " + idOf(s.GetNode())
	}
	return out
}
