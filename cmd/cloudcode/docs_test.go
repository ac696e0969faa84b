package main

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

//go:generate go test -run ^TestDocs$ -update .

var update = flag.Bool("update", false, "write docs/cli.md instead of comparing it")

// TestDocs keeps docs/cli.md equal to what the commands say of themselves.
func TestDocs(t *testing.T) {
	path := filepath.Join("..", "..", "docs", "cli.md")
	want := cliReference(newRootCmd())
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != want {
		t.Errorf("docs/cli.md is stale; run: go generate ./cmd/cloudcode\n%s", firstDifference(string(have), want))
	}
}

func firstDifference(have, want string) string {
	h, w := strings.Split(have, "\n"), strings.Split(want, "\n")
	for i := range max(len(h), len(w)) {
		var a, b string
		if i < len(h) {
			a = h[i]
		}
		if i < len(w) {
			b = w[i]
		}
		if a != b {
			return fmt.Sprintf("line %d:\n  file:     %s\n  commands: %s", i+1, a, b)
		}
	}
	return ""
}

// cliReference writes all commands into one page.
func cliReference(root *cobra.Command) string {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd("bash")
	var b strings.Builder
	fmt.Fprintf(&b, "# Command line\n\nMade from the commands' own help by `go generate ./cmd/cloudcode`; do not edit.\n\n")
	long, exits, _ := strings.Cut(root.Long, "Exit codes:")
	fmt.Fprintf(&b, "%s\n\n## Commands\n\n", strings.TrimSpace(long))
	visible(root, func(cmd *cobra.Command) {
		if cmd == root || cmd.HasAvailableSubCommands() && cmd.Name() != "completion" {
			return
		}
		fmt.Fprintf(&b, "- [`%s`](#%s): %s\n", cmd.CommandPath(), strings.ReplaceAll(cmd.CommandPath(), " ", "-"), cmd.Short)
	})
	fmt.Fprintf(&b, "\n## Flags of every command\n\n")
	flagTable(&b, root.PersistentFlags())
	fmt.Fprintf(&b, "\n## Exit codes\n\n```\n%s\n```\n", strings.Trim(exits, "\n"))
	visible(root, func(cmd *cobra.Command) {
		if cmd == root || cmd.HasAvailableSubCommands() && cmd.Name() != "completion" {
			return
		}
		use := cmd.UseLine()
		if cmd.Name() == "completion" {
			use = "cloudcode completion bash|zsh|fish|powershell"
		}
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n```\n%s\n```\n", cmd.CommandPath(), strings.TrimSpace(cmp.Or(cmd.Long, cmd.Short+".")), use)
		if cmd.HasExample() {
			fmt.Fprintf(&b, "\nExamples:\n\n```\n%s\n```\n", dedent(cmd.Example))
		}
		if cmd.HasAvailableLocalFlags() {
			b.WriteString("\n")
			flagTable(&b, cmd.LocalNonPersistentFlags())
		}
	})
	return b.String()
}

// visible calls fn for cmd and what is below it, except what help hides.
func visible(cmd *cobra.Command, fn func(*cobra.Command)) {
	fn(cmd)
	if cmd.Name() == "completion" {
		return // one command per shell, all alike
	}
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() && c.Name() != "help" {
			visible(c, fn)
		}
	}
}

func dedent(s string) string {
	lines := strings.Split(strings.Trim(s, "\n"), "\n")
	for i := range lines {
		lines[i] = strings.TrimPrefix(lines[i], "  ")
	}
	return strings.Join(lines, "\n")
}

func flagTable(b *strings.Builder, flags *pflag.FlagSet) {
	fmt.Fprintf(b, "| Flag | Environment | |\n|---|---|---|\n")
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" || f.Name == "version" {
			return
		}
		value, usage := pflag.UnquoteUsage(f)
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		if value != "" {
			name += " " + value
		}
		env := ""
		if i := strings.LastIndex(usage, " [$"); i >= 0 {
			env = "`" + strings.TrimSuffix(usage[i+3:], "]") + "`"
			usage = usage[:i]
		}
		switch f.DefValue {
		case "", "false", "0", "0s", "[]":
		default:
			usage += fmt.Sprintf(" (default %s)", f.DefValue)
		}
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", name, env, strings.ReplaceAll(usage, "|", `\|`))
	})
}
