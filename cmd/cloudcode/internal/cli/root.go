// Package cli is the command line that talks to a fleet: commands, output,
// errors, and how the server is found. The commands that run our processes are
// in package main.
package cli

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// DefaultDataDir is where a machine's state is.
const DefaultDataDir = "/var/lib/cloudcode"

const defaultPort = "7443"

// Command groups of the root's help.
const (
	GroupFleet   = "fleet"   // commands that talk to a server
	GroupProcess = "process" // commands that run one of our processes
)

// NewRoot returns the root command with all commands that talk to a server. The
// caller adds its own, then calls BindEnv.
func NewRoot(version string) *cobra.Command {
	root := &cobra.Command{
		Use:   "cloudcode",
		Short: "Run AI coding agents on your own machines",
		Long: `Cloud Code runs AI coding agents on your own machines: each session is an
OpenCode server in a container of its own, with a workspace of its own.

A server on this machine is found by itself (as root, below --data-dir); name
another one with --server. Flags can also be set in the environment, as the
variable in brackets says; a flag that is given wins.

` + exitCodesHelp,
		Example: `  cloudcode up                        # everything on this machine, in one process
  cloudcode session create main --wait
  cloudcode session open main`,
		Version:       version,
		SilenceErrors: true, // Execute prints them
		SilenceUsage:  true,
		Args:          unknownCommand,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetVersionTemplate("cloudcode {{.Version}}\n")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddGroup(
		&cobra.Group{ID: GroupProcess, Title: "Processes:"},
		&cobra.Group{ID: GroupFleet, Title: "Sessions and nodes:"},
	)

	f := root.PersistentFlags()
	f.String("data-dir", DefaultDataDir, "`FOLDER` where this machine keeps its state")
	f.String("server", "", "gRPC address of the server, `HOST:PORT` (default: the one on this machine)")
	f.String("ca-file", "", "`FILE` with the certificate authority that the server's certificate is checked against (default: pki/ca.crt below the data directory, and the system's)")
	f.String("token", "", "bearer token for the server (default: server/token below the data directory, for the server on this machine); better in the environment than as a flag, which others can see")
	f.String("username", "", "user name for the server; its password is read from --password-file or $SERVER_PASSWORD")
	SetEnvName(f, "username", "SERVER_USERNAME")
	f.String("password-file", "", "`FILE` that holds the password (default: $SERVER_PASSWORD)")
	f.Duration("request-timeout", 30*time.Second, "how long one request to the server may take")
	f.StringP("output", "o", formatTable, "output `FORMAT`: table, json or name")
	f.String("log-level", "", "`LEVEL` of what is logged to stderr: debug, info, warn or error (default: info for processes, warn for other commands)")
	complete(root, "output", formats...)
	complete(root, "log-level", "debug", "info", "warn", "error")
	for _, file := range []string{"ca-file", "password-file"} {
		_ = root.MarkPersistentFlagFilename(file)
	}
	_ = root.MarkPersistentFlagDirname("data-dir")

	root.AddCommand(newSessionCmd(), newNodeCmd(), newStorageCmd(), newImageCmd(), newAuthCmd(), newVersionCmd(version))
	return root
}

// DataDir returns the value of --data-dir.
func DataDir(cmd *cobra.Command) string { return flagString(cmd, "data-dir") }

// Logger returns a logger to the command's stderr at --log-level, or at def
// when that is not given.
func Logger(cmd *cobra.Command, def slog.Level) *slog.Logger {
	level := def
	if s := flagString(cmd, "log-level"); s != "" {
		_ = level.UnmarshalText([]byte(s)) // checked by prepare
	}
	return slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
}

// startedAnnotation is set on the root once a command line has been understood.
const startedAnnotation = "cloudcode_started"

// prepare runs before every command, once its flags are complete.
func prepare(cmd *cobra.Command) error {
	root := cmd.Root()
	if root.Annotations == nil {
		root.Annotations = map[string]string{}
	}
	root.Annotations[startedAnnotation] = "true"
	if o := flagString(cmd, "output"); !slices.Contains(formats, o) {
		return usagef("--output %q: want one of %s", o, strings.Join(formats, ", "))
	}
	if s := flagString(cmd, "log-level"); s != "" {
		var l slog.Level
		if err := l.UnmarshalText([]byte(s)); err != nil {
			return usagef("--log-level %q: want debug, info, warn or error", s)
		}
	}
	return nil
}

// Execute runs root with the program's arguments and returns the exit code.
// Errors are printed to root's stderr.
func Execute(ctx context.Context, root *cobra.Command) int {
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	if root.Annotations[startedAnnotation] == "" {
		err = usageError{err} // cobra's own: nothing has run yet
	}
	e := explain(err)
	if ctx.Err() != nil && e.Exit == exitError {
		e = &Error{Code: "CANCELLED", Msg: "interrupted", Exit: exitInterrupted, Err: err}
	}
	asJSON := wantsJSON(cmd)
	if e.Reason == "USAGE" && e.Hint == "" {
		e.Hint = fmt.Sprintf("see `%s --help`", cmd.CommandPath())
	}
	report(root.ErrOrStderr(), e, asJSON)
	return e.Exit
}

// wantsJSON also works when the flags could not be parsed.
func wantsJSON(cmd *cobra.Command) bool {
	f := cmd.Root().PersistentFlags().Lookup("output")
	return f.Value.String() == formatJSON || (!f.Changed && os.Getenv(envName(f)) == formatJSON)
}

// newGroup returns a command that only has commands below it.
func newGroup(use, short string) *cobra.Command {
	return &cobra.Command{
		Use:   use,
		Short: short,
		Args:  unknownCommand,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
}

// unknownCommand refuses what cobra takes for an argument of a group.
func unknownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	msg := fmt.Sprintf("unknown command %q for %q", args[0], cmd.CommandPath())
	cmd.SuggestionsMinimumDistance = 2
	if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
		msg += fmt.Sprintf("; did you mean %q?", s[0])
	}
	return usageError{fmt.Errorf("%s", msg)}
}

// args checks positional arguments and says which are wanted.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, a []string) error {
		if err := check(cmd, a); err != nil {
			return usageError{fmt.Errorf("%w; usage: %s", err, cmd.UseLine())}
		}
		return nil
	}
}

func flagString(cmd *cobra.Command, name string) string {
	if f := cmd.Flag(name); f != nil {
		return f.Value.String()
	}
	return ""
}

func complete(cmd *cobra.Command, flag string, values ...string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}
