package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// now is the clock of what is shown; tests stop it.
var now = time.Now

func newSessionCmd() *cobra.Command {
	cmd := newGroup("session", "Create, show, change and remove agent sessions")
	cmd.Aliases = []string{"sessions"}
	cmd.GroupID = GroupFleet
	cmd.AddCommand(
		newSessionCreateCmd(), newSessionListCmd(), newSessionGetCmd(), newSessionUpdateCmd(), newSessionDeleteCmd(),
		newSessionOpenCmd(), newSessionLogsCmd(), newSessionEventsCmd(),
		newSessionSuspendCmd(), newSessionResumeCmd(),
		newSessionCheckpointCmd(), newSessionCheckpointsCmd(), newSessionRestoreCmd(), newSessionForkCmd(),
		newSessionCopyCmd(), newSessionExportCmd(), newSessionImportCmd(), newSessionRecoverCmd(),
	)
	return cmd
}

func newSessionListCmd() *cobra.Command {
	var states, labels []string
	var filter string
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List sessions",
		Example: `  cloudcode session list
  cloudcode session list --state RUNNING --label team=web
  cloudcode session list --filter 'state = FAILED OR node = "nodes/n1"'`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			query, err := listFilter(filter, states, labels)
			if err != nil {
				return err
			}
			return withClient(cmd, func(c *client) error {
				all := &cloudcodev1.ListSessionsResponse{}
				if all.Sessions, err = c.listSessions(cmd.Context(), query); err != nil {
					return err
				}
				return printSessions(cmd, all, query != "")
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&filter, "filter", "", "AIP-160 filter over state, node and labels")
	f.StringSliceVar(&states, "state", nil, "only sessions in this `STATE`; can be repeated")
	f.StringSliceVar(&labels, "label", nil, "only sessions with this label, `KEY=VALUE` or KEY; can be repeated")
	complete(cmd, "state", sessionStates...)
	return cmd
}

var sessionStates = []string{"PENDING", "STARTING", "RUNNING", "SUSPENDING", "SUSPENDED", "FAILED", "LOST", "DELETING"}

var identifier = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// listFilter makes one AIP-160 filter of what was asked for.
func listFilter(filter string, states, labels []string) (string, error) {
	var and []string
	if filter != "" {
		and = append(and, filter)
	}
	var or []string
	for _, s := range states {
		s = strings.ToUpper(s)
		if _, ok := cloudcodev1.Session_State_value[s]; !ok {
			return "", usagef("--state %q: want %s", s, orList(sessionStates))
		}
		or = append(or, "state = "+s)
	}
	if len(or) > 0 {
		and = append(and, strings.Join(or, " OR "))
	}
	for _, l := range labels {
		key, value, has := strings.Cut(l, "=")
		if key == "" {
			return "", usagef("--label %q: want KEY=VALUE or KEY", l)
		}
		if !identifier.MatchString(key) {
			key = strconv.Quote(key)
		}
		if !has {
			and = append(and, "labels:"+key)
			continue
		}
		and = append(and, "labels."+key+" = "+strconv.Quote(value))
	}
	if len(and) == 1 {
		return and[0], nil
	}
	for i := range and {
		and[i] = "(" + and[i] + ")"
	}
	return strings.Join(and, " AND "), nil
}

func (c *client) listSessions(ctx context.Context, filter string) ([]*cloudcodev1.Session, error) {
	var all []*cloudcodev1.Session
	req := &cloudcodev1.ListSessionsRequest{PageSize: 1000, Filter: filter}
	for {
		rctx, cancel := c.request(ctx)
		resp, err := c.sessions.ListSessions(rctx, req)
		cancel()
		if err != nil {
			return nil, err
		}
		all = append(all, resp.GetSessions()...)
		if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
			return all, nil
		}
	}
}

func printSessions(cmd *cobra.Command, all *cloudcodev1.ListSessionsResponse, filtered bool) error {
	out := cmd.OutOrStdout()
	switch outputOf(cmd) {
	case formatJSON:
		return printJSON(out, all)
	case formatName:
		for _, s := range all.GetSessions() {
			fmt.Fprintln(out, s.GetName())
		}
		return nil
	}
	if len(all.GetSessions()) == 0 {
		if filtered {
			fmt.Fprintln(cmd.ErrOrStderr(), "no session matches")
		} else {
			fmt.Fprintln(cmd.ErrOrStderr(), "no sessions; make one with `cloudcode session create`")
		}
		return nil
	}
	rows := make([][]string, 0, len(all.GetSessions()))
	for _, s := range all.GetSessions() {
		state := s.GetState().String()
		if s.GetReason() != "" {
			state += " (" + s.GetReason() + ")"
		}
		rows = append(rows, []string{
			idOf(s.GetName()), state, idOf(s.GetNode()), strconv.Itoa(int(s.GetRestartCount())), storageColumn(s.GetStorage()), savedColumn(s.GetStorage(), now()),
			age(now(), s.GetCreateTime()), s.GetWebUri(),
		})
	}
	return printTable(out, []string{"ID", "STATE", "NODE", "RESTARTS", "STORAGE", "SAVED", "AGE", "WEB"}, rows)
}

func newSessionGetCmd() *cobra.Command {
	return &cobra.Command{
		Use:               "get ID",
		Aliases:           []string{"describe"},
		Short:             "Show one session",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeSessions(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			return withClient(cmd, func(c *client) error {
				s, err := c.getSession(cmd.Context(), a[0])
				if err != nil {
					return err
				}
				return printSession(cmd, s)
			})
		},
	}
}

func (c *client) getSession(ctx context.Context, id string) (*cloudcodev1.Session, error) {
	name, err := sessionName(id)
	if err != nil {
		return nil, err
	}
	ctx, cancel := c.request(ctx)
	defer cancel()
	return c.sessions.GetSession(ctx, &cloudcodev1.GetSessionRequest{Name: name})
}

// printSession prints one session in full.
func printSession(cmd *cobra.Command, s *cloudcodev1.Session) error {
	out := cmd.OutOrStdout()
	switch outputOf(cmd) {
	case formatJSON:
		return printJSON(out, s)
	case formatName:
		_, err := fmt.Fprintln(out, s.GetName())
		return err
	}
	return printFields(out, describeSession(s, now()))
}

func describeSession(s *cloudcodev1.Session, now time.Time) []field {
	state := s.GetState().String()
	if s.GetReason() != "" {
		state += " (" + s.GetReason() + ")"
	}
	progress := ""
	if s.GetProgress() != nil {
		st := stepOf(s)
		progress = strings.TrimSpace(st.text + "  " + bar(st.done, st.total, 0))
	}
	attach := ""
	if s.GetWebUri() != "" {
		attach = attachLine(s)
	}
	config := ""
	if n := len(s.GetSpec().GetOpencodeConfig()); n > 0 {
		config = fmt.Sprintf("%d bytes (-o json shows it)", n)
	}
	restarts := ""
	if s.GetRestartCount() > 0 {
		restarts = strconv.Itoa(int(s.GetRestartCount()))
	}
	fields := []field{
		{"ID", idOf(s.GetName())},
		{"State", state},
		{"Message", s.GetMessage()},
		{"Progress", progress},
		{"Web", s.GetWebUri()},
		{"Attach", attach},
		{"Node", idOf(s.GetNode())},
	}
	fields = append(fields, describeStorage(s.GetStorage(), now)...)
	return append(fields, []field{
		{"Image", s.GetSpec().GetImage()},
		{"OpenCode", s.GetOpencodeVersion()},
		{"Limits", limits(s.GetSpec().GetResources())},
		{"Labels", pairs(s.GetLabels(), "\n")},
		{"Node selector", pairs(s.GetSpec().GetNodeSelector(), "\n")},
		{"Environment", envNames(s.GetSpec().GetEnv())},
		{"OpenCode config", config},
		{"Restarts", restarts},
		{"Ready since", timeAndAge(now, s.GetReadyTime())},
		{"Created", timeAndAge(now, s.GetCreateTime())},
		{"Updated", timeAndAge(now, s.GetUpdateTime())},
		{"UID", s.GetUid()},
	}...)
}

// envNames shows no values: they are often keys.
func envNames(env map[string]string) string {
	if len(env) == 0 {
		return ""
	}
	names := make(map[string]string, len(env))
	for k := range env {
		names[k] = ""
	}
	return pairs(names, ", ") + " (-o json shows the values)"
}

func limits(r *cloudcodev1.Resources) string {
	var out []string
	if n := r.GetCpuMillis(); n > 0 {
		out = append(out, formatCPU(n)+" CPU")
	}
	if n := r.GetMemoryBytes(); n > 0 {
		out = append(out, formatBytes(n)+" memory")
	}
	if n := r.GetPids(); n > 0 {
		out = append(out, strconv.FormatInt(n, 10)+" processes")
	}
	if n := r.GetDiskBytes(); n > 0 {
		out = append(out, formatBytes(n)+" disk")
	}
	return strings.Join(out, ", ")
}

func newSessionDeleteCmd() *cobra.Command {
	var yes, wait, missing, purge bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:     "delete ID...",
		Aliases: []string{"rm"},
		Short:   "Remove sessions and their workspaces",
		Long: `Remove sessions: their containers are stopped and their workspaces removed from
their nodes. What is in object storage stays, complete up to the end ("cloudcode
session recover ID" brings such a session back), unless --purge is given.
Deleting cannot be undone, so it asks first on a terminal, and wants --yes elsewhere.`,
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: completeSessions(-1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			for _, id := range ids {
				if _, err := sessionName(id); err != nil {
					return err
				}
			}
			return withClient(cmd, func(c *client) error {
				if !yes {
					if err := c.confirmDelete(cmd, ids, purge); err != nil {
						return err
					}
				}
				// One that fails does not keep the others.
				var errs []error
				for _, id := range ids {
					if err := c.deleteSession(cmd, id, deletion{wait: wait, missing: missing, purge: purge, timeout: timeout}); err != nil {
						if len(ids) == 1 || cmd.Context().Err() != nil {
							return err
						}
						errs = append(errs, c.explain(err))
					}
				}
				return joinErrors(errs)
			})
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	f.BoolVar(&wait, "wait", false, "return when container and workspace are gone")
	f.BoolVar(&missing, "allow-missing", false, "a session that does not exist is no error")
	f.BoolVar(&purge, "purge", false, "also delete the session's folder in the bucket and its checkpoints; what forks of it share with it stays with them")
	f.DurationVar(&timeout, "timeout", 2*time.Minute, "how long --wait waits for each")
	SetEnvName(f, "purge", "")
	return cmd
}

// joinErrors makes one error of several, with the first one's exit code.
func joinErrors(errs []error) error {
	if len(errs) == 0 {
		return nil
	}
	e := *explain(errs[0])
	for _, err := range errs[1:] {
		e.Msg += "; " + explain(err).Msg
	}
	return &e
}

// confirmDelete asks on a terminal.
func (c *client) confirmDelete(cmd *cobra.Command, ids []string, purge bool) error {
	what, last := "session "+idOf(ids[0])+" and its workspace", "This cannot be undone."
	hint := "add --yes to delete the session and its workspace for good"
	if len(ids) > 1 {
		what = fmt.Sprintf("%d sessions and their workspaces (%s)", len(ids), strings.Join(ids, ", "))
	}
	if purge {
		what += ", with everything that is stored of them"
		if len(ids) == 1 {
			what = "session " + idOf(ids[0]) + " and its workspace, with everything that is stored of it"
		}
	}
	// What is stored stays, so that is said. One that is not there is told by
	// the delete itself.
	if len(ids) == 1 {
		if s, err := c.getSession(cmd.Context(), ids[0]); err == nil && s.GetStorage().GetPersistent() {
			switch uri := s.GetStorage().GetUri(); {
			case purge:
				what += " in " + uri
			default:
				what, last = "session "+idOf(ids[0]), "What is stored of it in "+uri+" stays; --purge removes that, too."
			}
		}
	}
	return confirm(cmd, "Delete "+what+"? "+last, "nothing was deleted", hint)
}

// confirm asks on a terminal; elsewhere --yes is wanted. nothing says that
// nothing was done.
func confirm(cmd *cobra.Command, question, nothing, hint string) error {
	in := cmd.InOrStdin()
	if !interactive(in) {
		return &Error{
			Code: "INVALID_ARGUMENT", Reason: "NOT_CONFIRMED", Exit: exitUsage,
			Msg:  nothing + ": there is no terminal to ask on",
			Hint: hint,
		}
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s [y/N] ", plain(question))
	answer, err := readAnswer(cmd.Context(), in)
	if err != nil {
		return err
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	return &Error{Code: "CANCELLED", Reason: "NOT_CONFIRMED", Msg: nothing, Exit: exitError}
}

// readAnswer reads a line, unless ctx ends first: reading a terminal cannot be
// interrupted, so that goroutine ends with the process.
func readAnswer(ctx context.Context, in io.Reader) (string, error) {
	type result struct {
		line string
		err  error
	}
	read := make(chan result, 1)
	go func() {
		line, err := bufio.NewReader(in).ReadString('\n')
		if errors.Is(err, io.EOF) {
			err = nil
		}
		read <- result{line, err}
	}()
	select {
	case r := <-read:
		return r.line, r.err
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// interactive reports whether a person types what r reads.
func interactive(r io.Reader) bool {
	if _, ok := r.(screen); ok {
		return true
	}
	f, ok := r.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

type deletion struct {
	wait, missing, purge bool
	timeout              time.Duration
}

func (c *client) deleteSession(cmd *cobra.Command, id string, d deletion) error {
	name, err := sessionName(id)
	if err != nil {
		return err
	}
	rctx, cancel := c.request(cmd.Context())
	s, err := c.sessions.DeleteSession(rctx, &cloudcodev1.DeleteSessionRequest{Name: name, AllowMissing: d.missing, PurgeStorage: d.purge})
	cancel()
	if err != nil {
		return err
	}
	done := "is being deleted"
	if d.wait && s.GetUid() != "" {
		done = "deleted"
		if err := c.waitGone(cmd.Context(), s, d.timeout); err != nil {
			return err
		}
	}
	switch out := cmd.OutOrStdout(); outputOf(cmd) {
	case formatJSON:
		return printJSON(out, s)
	case formatName:
		_, err = fmt.Fprintln(out, name)
	default:
		_, err = fmt.Fprintf(out, "session %s %s\n", idOf(name), done)
	}
	return err
}

func (c *client) waitGone(ctx context.Context, s *cloudcodev1.Session, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	last := s
	err := c.observe(ctx, s, func(s *cloudcodev1.Session) (bool, error) {
		if s != nil {
			last = s
		}
		return s == nil, nil
	}, nil)
	if errors.Is(err, context.DeadlineExceeded) {
		return timedOut(last, "is not gone after "+timeout.String(), "it goes on being deleted; look again with `cloudcode session get "+idOf(s.GetName())+"`")
	}
	return err
}

// timedOut says what a session was doing when time ran out.
func timedOut(s *cloudcodev1.Session, what, hint string) error {
	msg := fmt.Sprintf("session %s %s: %s", idOf(s.GetName()), what, s.GetState())
	if w := why(s); w != "" {
		msg += ", " + w
	}
	return &Error{Code: "DEADLINE_EXCEEDED", Reason: "TIMEOUT", Msg: msg, Hint: hint, Exit: exitTimeout}
}
